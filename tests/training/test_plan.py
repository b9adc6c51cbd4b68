"""Plans: counts against the real code, bytes against what is allocated, and what is too large to be tried here."""

import pytest
import torch

from metaflowmaps.errors import InputError
from metaflowmaps.networks import DiTConfig, MLPConfig, UNetConfig
from metaflowmaps.networks.dit import SIZES
from metaflowmaps.networks.flops import forward_flops, on_meta
from metaflowmaps.recipes import recipe
from metaflowmaps.training import plan as plans
from metaflowmaps.training.plan import bytes_of_training, count_calls, plan
from metaflowmaps.training.state import TrainState
from metaflowmaps.training.train_config import LossConfig

LATENTS = (4, 8, 8)
TINY = DiTConfig(width=32, depth=4, heads=4, encoder_depth=2, num_classes=10, guidance=[1.0, 2.5])


def changed(loss=None, **update):
    config = recipe("imagenet-b2")
    if loss:
        update["loss"] = LossConfig.model_validate({**config.loss.model_dump(), **loss})
    return config.model_copy(update=update)


def small(loss=None, **update):
    """The same recipe with a network of 32 numbers a token on 8×8 latents, small enough to be tried."""
    config = changed(loss, **{"batch_size": 16, "micro_batches": 2, "precision": "float32", **update})
    network = config.model.network.model_copy(update={"width": 32, "depth": 4, "heads": 4, "encoder_depth": 2})
    return config.model_copy(
        update={"model": config.model.model_copy(update={"network": network, "event_shape": (4, 8, 8)})}
    )


def test_flops_of_a_transformer_are_those_of_its_products():
    """Of N tokens of width W: 3W² + W² + 8W² and 2 N W a token and block, 6 W² of its modulation; and the ends."""
    config = TINY.model_copy(update={"guidance": False})
    tokens, width, pixels = 16, 32, 16
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = 3 * tokens * pixels * width + 2 * width**2  # patches of the state and the context in, patches out
    times = 5 * (256 * width + width**2) + 2 * width**2  # five embeddings, the gate of the context
    assert forward_flops(on_meta(config, LATENTS)) == 2 * (4 * block + ends + times)


def test_flops_on_the_meta_device_are_those_of_the_network_itself():
    for config, shape in ((TINY, LATENTS), (UNetConfig(width=8), (1, 8, 8)), (MLPConfig(), (3,))):
        assert forward_flops(on_meta(config, shape)) == forward_flops(config.network(shape)) > 0


def test_known_sizes():
    """119 GFLOP multiply-adds of DiT-XL/2 and 23 of B/2 (Peebles and Xie), twice."""
    for size, macs in (("XL", 118.6), ("B", 23.0)):
        flops = forward_flops(on_meta(TINY.model_copy(update=SIZES[size]), (4, 32, 32)))
        assert flops / 2e9 == pytest.approx(macs, rel=0.01)  # theirs leave out the context


@pytest.mark.parametrize(
    ("loss", "forwards", "backwards", "teacher"),
    [
        # a quarter of the rows is consistency; a guided row (half of .8) asks the teacher twice
        ({"consistency": "lagrangian-difference"}, 0.75 + 2 * 0.25, 0.75 + 2 * 0.25, 1),
        ({"consistency": "semigroup"}, 1 + 2 * 0.25, 1, 0.75),
        ({"consistency": {"name": "eulerian", "derivative": "forward"}}, 1 + 0.25, 1, 1),
        ({"consistency": {"name": "eulerian", "derivative": "difference"}}, 1 + 2 * 0.25, 1, 1),
        # no hook sees the backward pass through a derivative that is taken in forward mode
        ({"consistency": {"name": "lagrangian", "derivative": "forward"}}, 1, 0.75, 1),
        ({"consistency": "none"}, 1, 1, 1),
    ],
)
def test_calls_of_every_loss(loss, forwards, backwards, teacher):
    config = changed(loss)
    trial = count_calls(config, on_meta(config.model.network, config.model.event_shape))
    assert (trial.forwards, trial.backwards) == (forwards, backwards)
    # 128 rows: the guided ones are drawn
    assert trial.teacher_forwards == pytest.approx(teacher * (1 + 0.4), abs=0.15)


@pytest.mark.parametrize("name", ["radam", "soap"])
def test_bytes_are_those_that_a_state_holds(name):
    config = changed(precision="float32", optimizer=recipe("imagenet-b2").optimizer.model_copy(update={"name": name}))
    memory = bytes_of_training(on_meta(TINY, LATENTS), config)
    network = TINY.network(LATENTS)
    state = TrainState(network, config.optimizer)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(2):
        state.optimizer.step()
    held = [v for values in state.optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    assert memory["weights"] == memory["gradients"] == 4 * sum(p.numel() for p in network.parameters())
    assert sum(v.nbytes for v in held) == pytest.approx(memory["optimizer"], rel=0.02)


def test_a_share_of_ranks_and_a_copy_in_half_precision():
    shapes, config = on_meta(TINY, LATENTS), changed(shard=0)
    one, four = bytes_of_training(shapes, config), bytes_of_training(shapes, config, 4)
    assert four["optimizer"] == one["optimizer"] / 4
    assert bytes_of_training(shapes, changed(shard=2), 4)["optimizer"] == one["optimizer"] / 2
    assert bytes_of_training(shapes, changed(shard=1), 4) == one
    assert 2 * one["low_precision_copy"] == one["weights"]
    assert "low_precision_copy" not in bytes_of_training(shapes, changed(precision="float32"))


def test_a_plan_at_scale_allocates_nothing_and_needs_neither_data_nor_parent(monkeypatch):
    made = []
    real = DiTConfig.build

    def build(self, event_shape):
        if torch.empty(0).device.type != "meta":
            made.append(self.width)
        return real(self, event_shape)

    monkeypatch.setattr(DiTConfig, "build", build)
    for name, parameters, parent in (("imagenet-b2", 135, 130), ("imagenet-xl2", 684, 675)):
        figures = plan(recipe(name))
        assert round(figures["parameters"] / 1e6) == parameters
        assert round(figures["parameters_of_parent"] / 1e6) == parent
        assert "seconds_per_step" not in figures
        assert "--device cuda" in figures["not_measured"]
        assert figures["forwards_per_row"] == 1.25
    assert made == [16, 16]


def test_a_small_run_is_tried_as_it_is():
    figures = plan(small())
    assert figures["expected_seconds"] == figures["steps"] * figures["seconds_per_step"] > 0
    assert "not_measured" not in figures
    assert figures["forwards_per_row"] == figures["backwards_per_row"] == 1.25
    weight = 3 * 1.25 + figures["teacher_forwards_per_row"]
    assert figures["tflops_per_step"] == pytest.approx(weight * 16 * figures["gflops_per_call"] / 1e3)
    again = plan(small(checkpoint_activations=True))
    assert again["tflops_per_step"] == pytest.approx(figures["tflops_per_step"] * (weight + 1.25) / weight)


def test_the_drift_that_teaches_is_part_of_the_time():
    figures = plan(small(teacher="learned", drift_steps=1_000, drift_batch_size=16, steps=1))
    assert figures["drift_steps"] == 1_000
    steps = figures["seconds_per_step"] + 1_000 * figures["seconds_per_drift_step"]
    assert figures["expected_seconds"] == pytest.approx(steps)
    assert figures["expected_seconds"] > 10 * figures["seconds_per_step"]  # a step is not a hundred of the drift's


def test_the_mean_image_of_data_is_not_looked_for():
    """A plan reads no data, so it centres by nothing where the run will by the data's mean image."""
    config = small()
    config = config.model_copy(update={"model": config.model.model_copy(update={"data_mean": "image"})})
    assert not plans.subject(config).model.data_mean.any()


def test_long_steps_are_not_tried(monkeypatch):
    monkeypatch.setattr(plans, "CPU_STEP_FLOPS", 1e6)
    figures = plan(small())
    assert "takes minutes here" in figures["not_measured"]
    assert figures["forwards_per_row"] == 1.25


def test_what_cannot_be_is_refused_with_the_fix(monkeypatch):
    with pytest.raises(InputError, match=r"checkpoint_activations=true cannot go with a gradient through the JVP"):
        plan(changed({"consistency": {"name": "lagrangian", "derivative": "forward"}}, checkpoint_activations=True))

    def full(*_arguments, **_keywords):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(plans.Objective, "__call__", full)
    with pytest.raises(InputError, match=r"^8 rows at a time do not fit .*: --set micro_batches=4 or more"):
        plan(small())
