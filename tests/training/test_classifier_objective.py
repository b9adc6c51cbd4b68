"""Classifiers trained by the loop: what a batch holds, exact sums, exact resumption, learning, and being kept."""

import math
import signal

import numpy as np
import pytest
import torch
from test_resume import fingerprint

from conftest import normal
from metaflowmaps.checkpoint.models import load_classifier
from metaflowmaps.data import Images, ImageSet
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.recipes import recipe
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.training.building import build_classifier
from metaflowmaps.training.classifier_objective import ClassifierObjective, accuracy, shifted
from metaflowmaps.training.loop import Interrupted, NonFiniteLoss, Watch
from metaflowmaps.training.train_config import ClassifierConfig, TrainConfig
from metaflowmaps.training.training_run import run_classifier_training, run_training
from metaflowmaps.work.config import validated

OPTIMIZER = {"name": "adam", "lr": 5e-3, "betas": (0.9, 0.99), "warmup_steps": 10, "ema": 0.95}


def small(name="digits-guide", **changes):
    """A recipe of the digits with a network so small that 20 steps take a tenth of a second."""
    networks = {
        "digits-guide": {"name": "conv-classifier", "width": 8, "features": 8},
        "digits-judge": {"name": "patch-classifier", "width": 8, "depth": 1},
    }
    data = recipe(name).model_dump()
    data.update(network=networks[name], optimizer=OPTIMIZER, steps=20, batch_size=12, threads=1, log_every=5)
    return validated(ClassifierConfig, {**data, "keep_last": 1, **changes})


# -- batches ---------------------------------------------------------------------------------------------------------


def test_shifted_moves_by_whole_pixels_and_copies_the_border():
    x = normal(9, 2, 4, 5)
    by = torch.tensor([[0, 1, -1, 0, 0, 2, -3, 7, -7], [0, 0, 0, 1, -1, -2, 3, 7, -7]])
    out = shifted(x, by)
    assert out.shape == x.shape
    for i, (down, right) in enumerate(by.T.tolist()):
        for row in range(4):
            for column in range(5):
                source = x[i, :, min(max(row - down, 0), 3), min(max(column - right, 0), 4)]
                assert torch.equal(out[i, :, row, column], source)
    line = torch.tensor([[[[1.0, 2.0, 3.0]]]])  # one to the right: the left border comes in
    assert shifted(line, torch.tensor([[0], [1]])).flatten().tolist() == [1, 1, 2]


def test_a_batch_is_shifted_blurred_and_a_function_of_seed_and_step():
    config = small(batch_size=400, shift=1, noise=0.0)
    data = config.data.load()[0]
    torch.manual_seed(1)
    batch = ClassifierObjective(data, config).batch(None, 4)
    torch.manual_seed(2)
    assert torch.equal(ClassifierObjective(data, config).batch(None, 4).x, batch.x)
    assert not torch.equal(ClassifierObjective(data, config).batch(None, 5).label, batch.label)
    other = small(batch_size=400, shift=1, noise=0.0, seed=5)
    assert not torch.equal(ClassifierObjective(data, other).batch(None, 4).label, batch.label)
    # each image is one of the set, by its label, moved by -1, 0 or 1 each way; all nine moves occur
    moves = torch.tensor([(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)])
    images, seen = data.tensor(), set()
    everywhere = [shifted(images, move[:, None].expand(2, len(images))) for move in moves]
    for x, label in zip(batch.x[:60], batch.label[:60], strict=True):
        found = [i for i, moved in enumerate(everywhere) if (moved[data.labels == label] == x).flatten(1).all(1).any()]
        assert found
        seen.add(found[0])
    assert len(seen) == 9

    still = small(batch_size=400, shift=0, noise=0.0)
    blurred = small(batch_size=400, shift=0, noise=0.3)
    clean, noisy = (ClassifierObjective(data, c).batch(None, 4) for c in (still, blurred))
    assert torch.equal(clean.label, noisy.label)
    noise = noisy.x - clean.x
    n = noise.numel()  # 25,600 normals: 5 standard errors of their mean and of their standard deviation
    assert abs(float(noise.mean())) < 5 * 0.3 / math.sqrt(n)
    assert abs(float(noise.std()) / 0.3 - 1) < 5 / math.sqrt(2 * n)


def test_the_loss_is_smoothed_cross_entropy():
    config = small(smoothing=0.1)
    made = ClassifierObjective(config.data.load()[0], config)
    logits = normal(12, 10)
    batch = made.batch(None, 0)
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    expected = -(0.9 * log_p[torch.arange(12), batch.label] + 0.1 * log_p.mean(1))
    # float64: sums of ten
    torch.testing.assert_close(made(lambda x: logits, batch), expected, rtol=1e-13, atol=1e-13)
    assert not batch.x.requires_grad


def test_micro_batches_give_the_same_sums():
    config = small()
    model = build_classifier(config).double()
    made = ClassifierObjective(config.data.load()[0], config)
    batch = made.batch(model, 3)
    batch = type(batch)(batch.x.double(), batch.label)

    def total(pieces):
        model.zero_grad()
        values = [made(model, batch.rows(first, first + 12 // pieces)) for first in range(0, 12, 12 // pieces)]
        (torch.cat(values).sum() / 12).backward()
        return torch.cat(values).detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    rows, gradient = total(1)
    assert rows.shape == (12,)
    for pieces in (3, 12):
        again, gradient_again = total(pieces)
        # float64: other sums of the same numbers
        torch.testing.assert_close(again, rows, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(gradient_again, gradient, rtol=1e-9, atol=1e-12)
    assert batch.to(torch.device("meta")).x.device.type == batch.to(torch.device("meta")).label.device.type == "meta"
    assert batch.about(torch.tensor([True] * 3 + [False] * 9)) == f"classes {sorted(set(batch.label[:3].tolist()))}"


def test_accuracy_by_hand():
    # 1,500 images, more than one block: image i is all i/255·2 − 1, the "classifier" says 1 where it is bright
    images = (torch.arange(1500) % 256).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    bright = (torch.arange(1500) % 256 >= 128).long()

    def classifier(x):
        assert x.abs().max() <= 1
        return torch.stack([torch.zeros(len(x)), x.mean((1, 2, 3))], 1)

    labels = bright.clone()
    assert accuracy(classifier, ImageSet("made", images, labels, ("dark", "bright"))) == 1.0
    labels[[0, 700, 1499]] ^= 1
    assert accuracy(classifier, ImageSet("made", images, labels, ("dark", "bright"))) == 1497 / 1500


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-guide", "digits-judge"])
def test_a_run_resumed_is_a_run_never_stopped(tmp_path, monkeypatch, name):
    """Stopped by a signal after steps 5 and 13, where a record has just been written and where none has."""
    torch.set_num_threads(1)
    config = small(name)
    seen, real, stops = [], ClassifierObjective.batch, []
    run_classifier_training(
        config, tmp_path / "whole", watch=Watch(lambda stage, record: seen.append((stage, record.step)))
    )
    assert seen == [("classifier", step) for step in (5, 10, 15, 20)]

    def batch(self, model, step):
        if step + 1 in stops:
            signal.raise_signal(signal.SIGTERM)
        return real(self, model, step)

    monkeypatch.setattr(ClassifierObjective, "batch", batch)
    for stops in ([5], [13]):
        with pytest.raises(Interrupted, match=f"at step {stops[0]} of 20"):
            run_classifier_training(config, tmp_path / "stopped")
    monkeypatch.undo()
    run_classifier_training(config, tmp_path / "stopped")
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")
    other = run_classifier_training(small(name, seed=7), tmp_path / "other")
    one = (tmp_path / "whole/checkpoints/step-00000020/model.safetensors").read_bytes()
    assert (other.checkpoint / "model.safetensors").read_bytes() != one


def test_micro_batches_train_alike(tmp_path):
    """float32, 20 steps of Adam: weights part by less than a hundredth of the way they went.

    Sums are rounded differently, at 1e-7; Adam divides by gradients' sizes, and one that is nearly 0 is all rounding.
    """
    torch.set_num_threads(1)
    weights = [torch.cat([p.detach().flatten() for p in build_classifier(small()).parameters()])]
    for pieces in (1, 3):
        result = run_classifier_training(small(micro_batches=pieces), tmp_path / str(pieces))
        model = load_classifier(result.checkpoint, weights="raw")
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    start, one, other = weights
    assert float((one - other).norm() / (one - start).norm()) < 1e-2


def test_a_second_of_training_learns_the_digits(tmp_path):
    """200 steps of a small guide, about 2 s: held-out accuracy above .9. Chance is .1; seeds 0 to 3: .92 to .97."""
    torch.set_num_threads(1)
    network = {"name": "conv-classifier", "width": 16, "features": 32}
    config = small(network=network, steps=200, batch_size=64, log_every=100)
    train_set, held_out = config.data.load()
    before = accuracy(build_classifier(config), held_out)
    result = run_classifier_training(config, tmp_path)
    model = load_classifier(tmp_path)
    after = accuracy(model, held_out)
    assert before < 0.3
    assert after > 0.9
    assert accuracy(model, train_set) > 0.9
    assert result.loss < 1.0  # of chance: log 10 = 2.3
    # what is loaded is frozen, whole and in evaluation
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    x = held_out.tensor(slice(0, 3)).requires_grad_()
    assert model(x).shape == (3, 10)
    assert torch.autograd.grad(model(x).sum(), x)[0].abs().sum() > 0


def test_a_loss_that_is_no_number_names_its_classes(tmp_path):
    torch.set_num_threads(1)
    config = small(optimizer={**OPTIMIZER, "lr": 1e30, "warmup_steps": 0, "clip": 1e30}, steps=10)
    with pytest.raises(NonFiniteLoss, match=r"of 12 rows, with classes \[\d") as error:
        run_classifier_training(config, tmp_path)
    assert "\n" not in str(error.value)


def test_maps_and_classifiers_are_not_mistaken_for_one_another(tmp_path):
    torch.set_num_threads(1)
    data = gmm().model_dump()
    data["model"]["network"].update(width=8, depth=1)
    data.update(steps=1, batch_size=4, threads=1)
    a_map = run_training(validated(TrainConfig, data), tmp_path / "map").checkpoint
    classifier = run_classifier_training(small(steps=1), tmp_path / "classifier").checkpoint
    for load, given, has, needs in (
        (MetaFlowMap.from_pretrained, classifier, "classifier", "meta-flow-map"),
        (load_classifier, a_map, "meta-flow-map", "classifier"),
    ):
        with pytest.raises(InputError, match=f"'{has}', and a '{needs}' is needed here") as error:
            load(given)
        assert "\n" not in str(error.value)
    assert load_classifier(classifier).num_classes == 10
    # nor does one run go on from the other
    with pytest.raises(InputError, match="has another network"):
        run_classifier_training(small(steps=3), tmp_path / "mixed", resume=str(a_map))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shift": -1}, "greater than or equal to 0"),
        ({"noise": -0.1}, "greater than or equal to 0"),
        ({"smoothing": 1.0}, "less than 1"),
        ({"micro_batches": 5}, "batch_size must be a multiple of micro_batches"),
        ({"network": {"name": "mlp"}}, "allowed are conv-classifier, file.py:Name, patch-classifier"),
        ({"data": None}, "a data source is one of"),
    ],
)
def test_configurations_that_cannot_be(changes, match):
    with pytest.raises(InputError, match=match) as error:
        small(**changes)
    assert "\n" not in str(error.value)


def test_images_without_labels_are_refused(tmp_path):
    np.save(tmp_path / "plain.npy", np.arange(1280, dtype=np.uint8).reshape(20, 8, 8))
    config = small(data=Images(path=str(tmp_path / "plain.npy")))
    with pytest.raises(InputError, match="no labels to train a classifier with") as error:
        run_classifier_training(config, tmp_path / "run")
    assert "\n" not in str(error.value)
