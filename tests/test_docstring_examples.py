"""Every public name has an example in its docstring, and what stands there is what comes out.

Examples begin with ``import torch`` and ``import metaflowmaps as mfm``, as the site says.
"""

import doctest
import inspect

import pytest
import torch

import metaflowmaps as mfm

WEIGHTS = {  # of others: nothing here can run them
    "from_diffusers", "pretrained.load", "rewards.AestheticScore", "rewards.ClipScore", "rewards.HPSv2",
    "rewards.ImageClassifierReward", "rewards.ImageReward", "rewards.ImageRewardNetwork", "rewards.OCR",
    "rewards.PickScore",
}  # fmt: skip
VALUES = {"IMAGES"}  # a tuple of two objects, without a docstring of its own
MODULES = {"rewards", "pretrained"}
REWARDS = {f"rewards.{name}" for name in mfm.rewards.__all__}
NAMES = sorted(({*mfm.__all__} | REWARDS | {"pretrained.load"}) - MODULES - VALUES)


def examples_of(name):
    """The lines of a name's docstring that can be run."""
    thing = mfm
    for part in name.split("."):
        thing = getattr(thing, part)
    return doctest.DocTestParser().get_doctest(inspect.getdoc(thing), {"torch": torch, "mfm": mfm}, name, None, 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_right(name):
    test, said = examples_of(name), []
    assert test.examples, f"the docstring of mfm.{name} has no Examples:"
    skipped = [example for example in test.examples if example.options.get(doctest.SKIP)]
    assert bool(skipped) == (name in WEIGHTS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
        result = runner.run(test, out=said.append)
    assert result.failed == 0, "".join(said)
