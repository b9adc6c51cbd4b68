"""LoRAs: loaded they steer, tuned they are diffusers' own files, and those of another base are refused in a line."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.tiny_pipelines import FAMILIES
from safetensors.torch import load_file
from torch import Tensor

import metaflowmaps as mfm
from metaflowmaps.errors import InputError
from metaflowmaps.prompted.adapters import ATTENTION, WEIGHTS, Adapter
from metaflowmaps.prompted.call import ask
from metaflowmaps.prompted.tuning import AdaptedDrift, PromptedProblem

OWN = 1e-5  # as tests/prompted/test_families.py derives it
SMALL = {"rank": 2, "steps": 3, "batch_size": 2, "micro_batches": 1, "chunk": 64, "checkpoint_every": 1}
RAM = {"name": "ram", "pool": 64, "pool_steps": 1, "refresh_every": 1}
QUICK = ("FLUX.1",)


def call_of(name: str) -> dict[str, Any]:
    tiny = FAMILIES[name]
    call = next(iter(tiny.calls))
    return tiny.embeds | (tiny.negative if call != "plain" else {}) | tiny.calls[call] | tiny.size


def made_by(pipe: Any, name: str) -> Tensor:
    """Latents of diffusers' pipeline, or of ours."""
    arguments = call_of(name) | {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(3)}
    if isinstance(pipe, mfm.prompted.PromptedPipeline):
        return pipe(**arguments, output_type="latent").latents
    return pipe(**arguments, output_type="latent", return_dict=False)[0]


def published(name: str, folder: Path) -> Path:
    """A LoRA for a family, random in both factors, as diffusers saves it."""
    import peft  # seconds, which no other worker of the suite needs to spend

    pipe = FAMILIES[name].make()
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    network = getattr(pipe, part)
    settings = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=list(ATTENTION))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network.add_adapter(settings, adapter_name="style")
    weights = {k: v.contiguous() for k, v in peft.get_peft_model_state_dict(network, adapter_name="style").items()}
    metadata = {f"{part}_lora_adapter_metadata": network.peft_config["style"].to_dict()}
    type(pipe).save_lora_weights(folder, **{f"{part}_lora_layers": weights}, **metadata)
    return folder


def opened(name: str) -> Any:
    return mfm.from_diffusers(FAMILIES[name].make(), progress=False, batch_size=2, glass_steps=2)


def brightness(pictures: Tensor) -> Tensor:
    return 60 * pictures.flatten(1).mean(1)


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.attack]) for n in FAMILIES if n != "Wan 2.2 TI2V"]
)
def test_a_pipeline_with_a_lora_makes_diffusers_own_samples_and_steers(name, tmp_path):
    folder, theirs = published(name, tmp_path), FAMILIES[name].make()
    plain = made_by(theirs, name)
    theirs.load_lora_weights(folder)
    expected, ours = made_by(theirs, name), opened(name).load_lora_weights(folder)
    atol = OWN * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(made_by(ours, name), expected, rtol=0, atol=atol)
    torch.testing.assert_close(made_by(mfm.from_diffusers(theirs, progress=False), name), expected, rtol=0, atol=atol)
    assert float((expected - plain).abs().max()) > 10 * atol
    call = call_of(name) | {"num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    base = ours.steer(reward=brightness, method=mfm.BestOfN(n=1), **call).rewards
    assert bool((ours.steer(reward=brightness, method=mfm.DPS(), **call).rewards > base).all())


@pytest.mark.parametrize(  # nothing of it fits; by name alone; in part
    "other", ["SD1.5", pytest.param("SD3", marks=pytest.mark.attack), pytest.param("SANA", marks=pytest.mark.attack)]
)
def test_a_lora_of_another_base_is_refused_in_a_line(other, tmp_path):
    theirs = {"SD1.5": "FLUX.1", "SD3": "FLUX.1", "SANA": "SANA"}[other]
    folder = published("SD3" if other == "SANA" else other, tmp_path)
    ours = opened(theirs)
    before = made_by(ours, theirs)
    with pytest.raises(InputError, match=r"is no LoRA of this .* give one that was trained on this base") as refused:
        ours.load_lora_weights(folder)
    assert "\n" not in str(refused.value)
    assert not getattr(ours.family.networks[0], "peft_config", None)
    assert torch.equal(made_by(ours, theirs), before)


def test_a_folder_without_a_lora_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"holds no LoRA: give the folder of {WEIGHTS}"):
        opened("FLUX.1").load_lora_weights(tmp_path)


# -- tuning ------------------------------------------------------------------------------------------------------------


def test_a_tuned_lora_is_loaded_by_diffusers_with_the_same_output(tmp_path):
    ours, theirs = opened("FLUX.1"), FAMILIES["FLUX.1"].make()
    before = made_by(ours, "FLUX.1")
    file = ours.finetune(None, brightness, tmp_path, call_of("FLUX.1"), method=RAM, optimizer={"lr": 0.01}, **SMALL)
    assert file == tmp_path / "pytorch_lora_weights.safetensors"
    theirs.load_lora_weights(tmp_path)
    tuned = made_by(ours, "FLUX.1")
    torch.testing.assert_close(made_by(theirs, "FLUX.1"), tuned, rtol=0, atol=OWN * float(tuned.abs().max()))
    assert float((tuned - before).abs().max()) > 1e-3
    card = (tmp_path / "README.md").read_text()
    assert all(said in card for said in ("FluxPipeline", "brightness", "RAM", "load_lora_weights"))
    again = load_file(file)
    ours.finetune(None, brightness, tmp_path, call_of("FLUX.1"), method=RAM, optimizer={"lr": 0.01}, **SMALL)
    assert same(load_file(file), again)  # finished, it is not tuned further
    with pytest.raises(InputError, match="holds another run"):
        ours.finetune(None, brightness, tmp_path, call_of("FLUX.1"), method=RAM, **SMALL)


@pytest.mark.attack
@pytest.mark.parametrize("method", [RAM, {"name": "tilt-matching", "pool": 64, "pool_steps": 1, "levels": 2}])
def test_a_tuning_that_is_stopped_ends_with_the_same_weights(method, tmp_path):
    left = [2 if method is RAM else 1]

    def stopping(pictures: Tensor) -> Tensor:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return 10 * brightness(pictures)  # strong enough for two levels

    settings = SMALL | {"method": method, "optimizer": {"lr": 0.01}}
    ours = opened("FLUX.1")
    with pytest.raises(KeyboardInterrupt):
        ours.finetune(None, stopping, tmp_path / "stopped", call_of("FLUX.1"), **settings)
    assert not getattr(ours.family.networks[0], "peft_config", None)
    left[0] = -1
    for out in ("stopped", "whole"):
        ours.finetune(None, stopping, tmp_path / out, call_of("FLUX.1"), **settings)
    assert same(load_file(tmp_path / "stopped" / WEIGHTS), load_file(tmp_path / "whole" / WEIGHTS))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def drift_of(name: str) -> tuple[Any, AdaptedDrift]:
    ours = opened(name)
    model = ask(ours.family, ours.settings, None, 3, call_of(name)).model
    return model, AdaptedDrift(model, Adapter(ours.family, 2, ATTENTION, 0))


def test_the_base_keeps_its_drift_while_the_student_moves():
    model, student = drift_of("FLUX.1")
    x = torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([0.2, 0.7]), {"prompt": torch.tensor([0, 1])}
    problem = PromptedProblem(copy.deepcopy(student), brightness)
    with torch.no_grad():
        before = model.drift(t, x, cond)
        for factor in student.factors.values():
            factor.add_(0.3)
        moved = student.drift(t, x, cond)
        assert torch.equal(problem.at(t, x, cond).drift.isfinite(), torch.ones_like(x, dtype=torch.bool))
        torch.testing.assert_close(problem.base.drift(t, x, cond), before, rtol=0, atol=0)
        # drift to F and back in float32: twice some roundings of 6e-8, divided by the chart's speed, 1/4 at t = .7
        torch.testing.assert_close(problem.at(t, x, cond).drift, before, rtol=1e-5, atol=1e-5)
    assert float((moved - before).abs().max()) > 1e-2
    assert torch.equal(student.drift(t, x, cond), moved)  # and has its own back


def test_a_loss_has_its_gradient_in_the_factors_alone():
    model, student = drift_of("FLUX.1")
    x, t = torch.zeros(1, *model.event_shape), torch.tensor([0.5])
    student.anchor(torch.zeros(1), x, {"prompt": torch.tensor([0])})(t, t, x).square().sum().backward()
    assert {name for name, p in model.network.named_parameters() if p.grad is not None} == {
        f"parts.0.{name.replace('/', '.')}" for name in student.factors
    }


@pytest.mark.attack
@pytest.mark.parametrize("method", ["ram", "tilt-matching"])
def test_tuning_raises_the_reward_of_every_seed(method, tmp_path):
    ours = opened("FLUX.1")
    call = call_of("FLUX.1") | {"num_inference_steps": 6, "num_images_per_prompt": 8, "seed": 3}

    def reward(pictures: Tensor) -> Tensor:
        return 190 * pictures.flatten(1).mean(1)  # a standard deviation of .9 over samples

    base = ours.steer(reward=reward, method=mfm.BestOfN(n=1), output_type="latent", **call).rewards
    ours.finetune(
        None,
        reward,
        tmp_path,
        call_of("FLUX.1"),
        method={"name": method, "pool": 256, "pool_steps": 4},
        rank=4,
        targets=(*ATTENTION, "proj_out"),
        steps=80,
        batch_size=32,
        micro_batches=1,
        chunk=64,
        optimizer={"lr": 1e-2, "warmup_steps": 5, "ema": 0.9},
    )
    tuned = ours.steer(reward=reward, method=mfm.BestOfN(n=1), output_type="latent", **call).rewards
    assert int((tuned > base).sum()) == 16  # by chance once in 65,536


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "mfm-ft"}, "method=tilt-matching or method=ram"),
        ({"method": "adjoint-matching"}, "method=tilt-matching or method=ram"),
        ({"targets": ("nobody",)}, "name some by targets="),
        ({"step": 3}, "step"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_a_line(settings, said, tmp_path):
    with pytest.raises(InputError, match=said) as refused:
        opened("FLUX.1").finetune(None, brightness, tmp_path / "out", call_of("FLUX.1"), **SMALL | settings)
    assert "\n" not in str(refused.value)


def test_a_pipeline_with_a_style_is_not_tuned(tmp_path):
    ours = opened("FLUX.1").load_lora_weights(published("FLUX.1", tmp_path / "style"))
    with pytest.raises(InputError, match="fuse it first"):
        ours.finetune(None, brightness, tmp_path / "out", call_of("FLUX.1"), method=RAM, **SMALL)


@pytest.mark.attack
def test_a_pipeline_with_two_networks_is_not_tuned(tmp_path):
    with pytest.raises(InputError, match="has 2 networks"):
        opened("Wan 2.2").finetune(None, brightness, tmp_path / "out", call_of("Wan 2.2"), method=RAM, **SMALL)


def test_without_peft_one_line_says_what_to_install(monkeypatch, tmp_path):
    ours = opened("FLUX.1")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"adapters need peft: pip install 'metaflowmaps\[lora\]'"):
        ours.load_lora_weights(tmp_path)
