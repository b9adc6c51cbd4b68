"""mfm run: every recipe is planned without data, weights or a map; what cannot be is refused in one line."""

import json

import pytest

from metaflowmaps.cli.run import LATENTS, PASSES, XL2
from metaflowmaps.lab.imagenet_tasks import TASKS, task
from metaflowmaps.networks.flops import forward_flops, on_meta
from metaflowmaps.recipes import RECIPES


@pytest.fixture(scope="module")
def flops() -> float:
    """Of one sample through the network of the family."""
    return forward_flops(on_meta(XL2, LATENTS))


@pytest.mark.parametrize("name", TASKS)
def test_every_recipe_is_planned(command, flops, name):
    code, text, err = command("run", name, "--dry-run", "--json")
    assert code == 0, err
    found = json.loads(text)["metrics"]
    assert round(found["parameters"] / 1e6) == 684
    assert round(found["parameters_of_parent"] / 1e6) == 675
    parts = [value for key, value in found.items() if key.startswith("memory_") and key != "memory_bytes"]
    assert found["memory_bytes"] == sum(parts) >= 4 * found["parameters"]
    assert found["pflops"] == pytest.approx(found["calls"] * flops / 1e15)


def test_calls_are_those_of_the_settings(command):
    def calls(name, *settings):
        given = [part for setting in settings for part in ("--set", setting)]
        return json.loads(command("run", name, "--dry-run", "--json", *given)[1])["metrics"]["calls"]

    assert calls("imagenet-fid", "samples=1000") == 1000 * (1 + 2 + 4)
    drift = ("map=none", "steps=7", "batch_size=5", "num_draws=2", "states.pool=64", "states.pool_steps=3")
    # student with its gradient, the base's drift, two differentiated draws; then the pool
    first = 7 * 5 * (PASSES + 1 + 2 * PASSES) + 64 * 3
    assert calls("imagenet-xl2-finetune", *drift) == first
    second = ("map=distil", "distil_steps=3", "distil_batch_size=4", "distil_pool=64", "distil_pool_steps=2")
    # the map's two differentiated calls and one of the tuned drift
    assert calls("imagenet-xl2-finetune", *drift[1:], *second) == first + 3 * 4 * (2 * PASSES + 1) + 64 * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "imagenet-fidd", "--dry-run"), "did you mean 'imagenet-fid'"),
        (("run", "imagenet-fid"), "mfm run imagenet-fid CHECKPOINT"),
        (("train", "imagenet-fid"), "mfm run imagenet-fid CHECKPOINT"),
        (("run", "imagenet-fid", "digits", "--dry-run"), "no map of the ImageNet family"),
        (("run", "imagenet-fid", "--dry-run", "--set", "sample=3"), "did you mean 'samples'"),
    ],
)
def test_what_cannot_be_is_one_line(command, arguments, words):
    code, out, err = command(*arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert out == ""


def test_recipes_lists_them_all(command):
    listed = [line.split()[0] for line in command("recipes")[1].splitlines()]
    assert listed == [*RECIPES, *TASKS]
    assert all(task(name, fast=True) != task(name) for name in TASKS)
