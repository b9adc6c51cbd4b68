"""What is steered with where nobody says: one choice, whichever door it comes in by."""

import inspect

import torch

import metaflowmaps as mfm
from conftest import F64, PATHS, paper_law
from metaflowmaps.cli.steer import Steer
from metaflowmaps.steering import USUAL
from metaflowmaps.steering.presets import settled

MODEL = mfm.ExactModel(PATHS["linear"], paper_law())
MILD = mfm.rewards.LinearGaussian(torch.tensor([1.2, -0.8], dtype=F64), -1.0, 2.0)


def test_steer_without_a_method_is_the_usual_preset():
    bare, said = mfm.steer(MODEL, MILD, 4, seed=0), mfm.steer(MODEL, MILD, 4, *USUAL, seed=0)
    assert torch.equal(bare.samples, said.samples)
    assert bare.cost["nfe"] == 60 * (1 + 2 * 16)  # the drift, 16 draws and their rewards
    two = mfm.steer(MODEL, MILD, 4, process=mfm.ODE(steps=2), seed=0)
    assert two.cost["nfe"] == 2 * (1 + 2 * 16)


def test_the_doors_agree():
    """Python, pipeline and command line; a method that is named brings the process it prefers, not the preset's."""
    assert settled(None, None) == USUAL
    assert Steer(checkpoint="map").choices() == Steer(checkpoint="map", preset="usual").choices() == tuple(USUAL)
    for door in (mfm.steer, mfm.Pipeline.steer, mfm.Pipeline.estimate):
        parameters = inspect.signature(door).parameters
        assert parameters["method"].default is parameters["process"].default is None
    named = settled("mfm-gf", None)
    assert named == (mfm.MFMGF(), mfm.ODE()) == Steer(checkpoint="map", method="mfm-gf").choices()
    assert named.process.steps == 250
    assert settled("mfm-gf", "sde").process == mfm.SDE()
