"""Training on general contexts: from a process, from a file, from a simulator."""

import json
import math

import numpy as np
import pytest
import torch

import metaflowmaps as mfm
from metaflowmaps.data import ContextLaw, Process, Sequences
from metaflowmaps.errors import InputError
from metaflowmaps.lab.evaluate.context_error import ContextEvalConfig, evaluate_contexts
from metaflowmaps.networks import MLPConfig, ObservedConfig
from metaflowmaps.recipes import recipe
from metaflowmaps.training.building import build_map, fitted
from metaflowmaps.training.parents import exact_teacher
from metaflowmaps.training.training_run import build_objective, run_training

SMALL = ObservedConfig(body=MLPConfig(width=24, depth=2), width=16, heads=2)


def small(data, name="process", **more):
    """A recipe made small."""
    config = recipe(name)
    model = config.model.model_copy(update={"network": SMALL})
    tiny = {"batch_size": 32, "drift_batch_size": 32, "drift_steps": 0, "steps": 4, "threads": 1, "checkpoint_every": 2}
    return fitted(config.model_copy(update={**tiny, "data": data, "model": model, **more}))


def test_an_exact_gaussian_process_leaves_nothing_to_learn():
    config = small(Process(process="ou", num=20_000))
    model, objective = build_map(config), build_objective(config, exact_teacher(config))
    batch = objective.batch(model, 0)
    # a unit velocity would give 1: 25 nodes estimated from 20,000 paths err by about √(2/20,000) of each entry, and the
    # shrinkage by 25/20,000; neighbours .125 apart, of correlation .88, magnify both twentyfold
    loss = objective(model, batch).detach()
    assert float(loss.max()) < 0.05
    assert float(loss.mean()) < 2e-3


def test_a_batch_of_contexts_is_a_function_of_its_step():
    config = small(Process(process="ou-mixture", num=100))
    model, objective = build_map(config), build_objective(config, exact_teacher(config))
    one, other, next_one = (objective.batch(model, step) for step in (3, 3, 4))
    assert torch.equal(one.cond["values"], other.cond["values"])
    assert torch.equal(one.x_1, other.x_1)
    assert not torch.equal(one.cond["values"], next_one.cond["values"])
    # rows are cut with their contexts: a piece's losses are those of the whole
    whole = objective(model, one)
    torch.testing.assert_close(objective(model, one.rows(20, 30)), whole[20:30])


def test_a_file_of_sequences_trains_a_map_with_a_learned_teacher(tmp_path):
    values = np.random.default_rng(0).normal(size=(30, 8, 2)).cumsum(1)
    values[0, 3] = math.nan
    np.save(tmp_path / "paths.npy", values)
    data = Sequences(path=str(tmp_path / "paths.npy"), missing="mask", contexts=ContextLaw(place="latest", lead=3))
    config = small(data, "sequences", drift_steps=2)
    result = run_training(config, tmp_path / "run")
    model = mfm.MetaFlowMap.from_pretrained(result.checkpoint)
    context = mfm.Context(torch.zeros(1, 2, 2), torch.tensor([0.0, 1.0]), query=3.0)
    assert model.draw(context, 3).shape == (3, 1, 2)
    assert model.network.span.tolist() == [0.0, 7.0]


TINY = {
    "steps": 2, "drift_steps": 2, "batch_size": 8, "drift_batch_size": 8, "threads": 1, "model.network.width": 8,
    "model.network.heads": 2, "model.network.body.width": 8, "model.network.body.depth": 2,
}  # fmt: skip


def test_a_function_that_simulates_trains_a_map_of_its_parameters(tmp_path):
    def simulate(n, generator):
        theta = torch.randn(n, 2, generator=generator)
        return theta, torch.cat([theta, theta[:, :1] ** 2], 1)

    model = mfm.train("simulator", tmp_path / "run", simulate, data={"num": 50}, **TINY)
    assert model.network.observed_shape == (3,)
    draws = model.draw(mfm.Context(torch.zeros(4, 1, 3), torch.zeros(1), query=0.0), 5)
    assert draws.shape == (5, 4, 2)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["data"]["simulate"].endswith("simulate")


def test_sequences_that_a_generator_yields_are_kept_and_trained_on(tmp_path):
    def walks(seed=0):
        g = np.random.default_rng(seed)
        for length in (6, 9) * 5:
            yield g.normal(size=(length, 2)).cumsum(0)

    model = mfm.train("sequences", tmp_path / "run", walks(), **TINY)
    assert model.event_shape == (2,)
    assert model.network.span.tolist() == [0.0, 8.0]
    again = mfm.train("sequences", tmp_path / "run", walks(), **TINY)  # finished: what is there
    assert torch.equal(again.network.body.input.weight, model.network.body.input.weight)
    with pytest.raises(InputError, match="other data"):
        mfm.train("sequences", tmp_path / "run", walks(seed=1), **TINY)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("simulator", 3, "a simulator is a function"),
        ("sequences", 3, "an array"),
        ("sequences", [torch.zeros(3, 1), "no"], "sequence 1 is no array"),
        ("images", torch.zeros(3, 1), "the path of its files"),
        ("digits-judge", None, "trains a classifier"),
    ],
)
def test_data_that_a_recipe_cannot_take_are_refused(tmp_path, name, data, words):
    with pytest.raises(InputError, match=words):
        mfm.train(name, tmp_path / "run", data)


def test_contexts_need_a_network_that_reads_them():
    config = recipe("process")
    model = config.model.model_copy(update={"network": MLPConfig()})
    with pytest.raises(InputError, match=r"model\.network=observed"):
        fitted(config.model_copy(update={"model": model}))


@pytest.mark.attack
def test_a_map_of_a_mixture_of_processes_draws_its_posteriors(tmp_path):
    config = fitted(recipe("process", fast=True).model_copy(update={"threads": 1}))
    model = mfm.MetaFlowMap.from_pretrained(run_training(config, tmp_path / "run").checkpoint)
    judged = evaluate_contexts(model, config.data, ContextEvalConfig(map_steps=(1,), samples=2048, contexts=16))
    assert max(judged["ratio"]["map-1"].values()) <= 1.3  # the goal; 1.27 when first measured
