"""What README, docs and interface promise and no other test holds: a test for each, whose docstring says it.

Held elsewhere: a sample is its seed's (steering/test_seeds), costs (test_meter), resuming (training/test_resume,
cli/test_finetune, cli/test_sharding), damage (checkpoint/), what is not finite (test_non_finite), choices of one's own
(extension/), imports (test_import), exit codes of bad input, interrupts and full disks (cli/).
"""

import inspect
import json
import re
import shlex
from pathlib import Path

import click
import pytest
import torch

import metaflowmaps as mfm
from conftest import CASES, PATHS
from conftest import mfm_command as command
from metaflowmaps.checkpoint import load_classifier, resolve_checkpoint
from metaflowmaps.cli.app import COMMANDS, main
from metaflowmaps.cli.steer import Steer
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.random import randn, stream
from metaflowmaps.steering import USUAL, Method
from metaflowmaps.steering.presets import settled
from metaflowmaps.work.choices import choices

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMPUTING = ("train", "sample", "posterior", "steer", "finetune", "eval posterior", "eval steering", "run")
FEW = {
    "sample": ["--num", "4"],
    "posterior": ["--num-draws", "4"],
    "steer": ["--num", "4", "--steps", "2", "--method", "mfm-gf"],
    "eval value": [
        word for setting in ("states=4", "times=[0.5]", "num_draws=2", "map_steps=[1]", "glass_steps=[1]")
        for word in ("--set", setting)
    ],
}  # fmt: skip


def found(words: list[str]) -> tuple[click.Command, click.Context, list[str]]:
    """The command that words begin with, and the words behind it."""
    group, context = main(), click.Context(main(), info_name="mfm")
    while isinstance(group, click.Group):
        group = group.get_command(context, words[0])
        context, words = click.Context(group, parent=context, info_name=words[0]), words[1:]
    return group, context, words


def random_map() -> mfm.MetaFlowMap:
    network = MLPConfig(width=8, depth=1).network((2,))
    for weight in network.parameters():
        weight.data = 0.3 * randn(tuple(weight.shape), stream(0, "weights", *weight.shape))
    return mfm.MetaFlowMap(network, PATHS["linear"])


def mild(x: torch.Tensor) -> torch.Tensor:
    return -0.4 * (x - 0.5).square().sum(1)


# -- the command line --------------------------------------------------------------------------------------------------


def typed() -> list[tuple[str, str]]:
    """Every command of the pages: of their blocks, or between backticks."""
    lines = []
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.S | re.M)
        whole = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        whole += [" ".join(words.split()) for words in re.findall(r"`(mfm [^`]+)`", prose)]
        lines += [(page.name, line.partition(" #")[0]) for line in whole if line.startswith("mfm ")]
    return sorted(set(lines))


def test_every_command_of_the_docs_is_one_with_options_that_it_has():
    """A line that is shown can be typed."""
    wrong, read = [], 0
    for page, line in typed():
        if page == "log.md" or re.search(r"[…|]", line) or line.split()[1] not in COMMANDS or line == "mfm eval":
            continue
        try:
            known, context, rest = found(shlex.split(line)[1:])
            known.make_parser(context).parse_args(args=list(rest))
            read += 1
        except (click.UsageError, mfm.InputError, IndexError, ValueError) as error:
            wrong.append(f"{page}: {line}: {error}")
    assert not wrong
    assert read > 40


@pytest.mark.parametrize("name", COMPUTING)
def test_every_command_that_computes_has_the_same_options(name):
    """``--out --set --seed --device --json --dry-run``; those that train have ``--max-steps`` and ``--resume``."""
    known, _, _ = found(name.split())
    options = {text for parameter in known.params for text in parameter.opts}
    assert options >= {"--out", "--set", "--seed", "--device", "--json", "--dry-run"}
    assert (options >= {"--max-steps", "--resume"}) == (name in ("train", "finetune"))


@pytest.fixture(scope="module")
def places(run, tmp_path_factory):
    """Of each command on a tiny run: the folder of its results, and what is typed."""
    root = tmp_path_factory.mktemp("promises")
    folders = {name: root / name.replace(" ", "-") for name in FEW}
    return {name: (out, [*name.split(), run, *FEW[name], "--out", out]) for name, out in folders.items()}


@pytest.mark.parametrize("name", FEW)
def test_results_are_one_document_on_stdout_and_the_same_in_the_folder(capsys, places, name):
    """``--json``: the result on stdout and nothing else there; ``results.json`` is the same, of the agreed shape."""
    out, words = places[name]
    code, text, err = command(capsys, *words, "--json")
    assert code == 0, err
    results = json.loads(text)
    kept = json.loads((out / "results.json").read_text())
    assert results == {**kept, "out": str(out / "results.json")}
    assert kept.keys() >= {"schema", "command", "config", "metrics", "cost", "environment"}
    assert (kept["schema"], kept["command"]) == (1, name)
    assert kept["environment"].keys() == {"torch", "device", "threads", "commit", "seed"}


@pytest.mark.parametrize("name", FEW)
def test_a_folder_is_of_one_request(capsys, places, name):
    """``--out`` with the same configuration reports what is there, with another is refused: nothing is touched."""
    out, words = places[name]
    assert command(capsys, *words)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert command(capsys, *words)[0] == 0
    code, text, err = command(capsys, *words, "--seed", "7")
    assert (code, text, err.count("\n")) == (2, "", 1), err
    assert "another run" in err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_bare_margin_says_its_class(capsys, tmp_path, monkeypatch):
    """Results name the reward that they are of."""
    monkeypatch.chdir(tmp_path)
    for words in ([], ["--reward", "margin", "--strength", "2"]):
        code, text, err = command(capsys, "steer", "digits", *words, "--dry-run", "--json")
        assert code == 0, err
        assert json.loads(text)["config"]["reward"] == "margin:3"
    assert list(tmp_path.iterdir()) == []


# -- the library -------------------------------------------------------------------------------------------------------


def test_the_arguments_of_steer_are_those_of_the_interface():
    """Programs outside call them by position and by name."""
    parameters = inspect.signature(mfm.steer).parameters.values()
    ordered = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert ordered == ["model", "reward", "num_samples", "method", "process"]
    assert named == ["cond", "seed", "batch_size", "callback", "progress"]


def test_methods_have_the_names_of_the_interface():
    """The names that are typed, and the classes behind them."""
    named = {
        "mfm-g": mfm.MFMG, "mfm-gf": mfm.MFMGF, "mfm-search": mfm.Search, "mfm-smc": mfm.SMC, "none": mfm.Unsteered,
        "rejection": mfm.Rejection, "dps": mfm.DPS, "tds": mfm.TDS, "best-of-n": mfm.BestOfN, "glass": mfm.Glass,
        "exact": mfm.Exact,
    }  # fmt: skip
    known = choices(Method)
    assert {name: known[name] for name in named} == named


def test_there_is_one_set_of_defaults():
    """Python, the pipeline and the command line steer alike where nobody says how."""
    for steered in (mfm.steer, mfm.Pipeline.steer):
        given = inspect.signature(steered).parameters
        assert settled(given["method"].default, given["process"].default) == USUAL
    typed = Steer(checkpoint="digits")
    assert (typed.method, typed.process) == USUAL
    named = Steer(checkpoint="digits", method="mfm-gf")
    assert (named.method, named.process) == settled("mfm-gf", None)


@pytest.mark.parametrize("method", choices(Method))
def test_steering_leaves_model_and_reward_as_they_were(method):
    """Weights, to the bit, and whether they take gradients and are in training mode."""
    law, reward = CASES["isotropic"].law, mfm.rewards.LinearGaussian([1.0, -0.6], 0.8, 1.0)
    model = mfm.ExactModel(PATHS["linear"], law) if method == "exact" else random_map()
    judge = torch.nn.Linear(2, 1)
    modules = [judge, *([] if method == "exact" else [model])]
    before = [(w.clone(), w.requires_grad, m.training) for m in modules for w in m.parameters()]
    mfm.steer(model, reward if method == "exact" else lambda x: judge(x)[:, 0], 8, method, mfm.ODE(steps=2), seed=0)
    after = [(w, w.requires_grad, m.training) for m in modules for w in m.parameters()]
    assert len(before) == len(after)
    assert all(torch.equal(old[0], new[0]) and old[1:] == new[1:] for old, new in zip(before, after, strict=True))
    assert all(w.grad is None for m in modules for w in m.parameters())


def test_rewards_include_the_strength():
    """λ lives in the reward alone, ``−strength · ‖y − A x‖² / (2 noise_std²)`` without a normaliser."""
    A, y = torch.tensor([[1.0, -0.6], [0.3, 0.2]]), torch.tensor([0.8, -0.1])
    reward = mfm.rewards.LinearGaussian(A, y, 0.5, strength=3.0)
    result = mfm.steer(random_map(), reward, 4, "mfm-gf", mfm.ODE(steps=2), seed=0)
    by_hand = -3.0 * (y - result.samples.detach() @ A.T).square().sum(1) / (2 * 0.5**2)
    torch.testing.assert_close(result.rewards, by_hand, rtol=1e-5, atol=1e-5)  # float32


def test_a_seed_may_be_a_number_a_generator_or_one_a_sample():
    """A result's own seeds make it again, and it says what it cost under the agreed names."""
    model, moves = random_map(), mfm.ODE(steps=2)
    first = mfm.steer(model, mild, 4, "mfm-gf", moves, seed=3)
    again = mfm.steer(model, mild, 4, "mfm-gf", moves, seed=3)
    by_seeds = mfm.steer(model, mild, 4, "mfm-gf", moves, seed=first.seeds)
    drawn = mfm.steer(model, mild, 4, "mfm-gf", moves, seed=torch.Generator().manual_seed(3))
    assert torch.equal(first.samples, again.samples)
    assert torch.equal(first.samples, by_seeds.samples)
    assert drawn.seeds.unique().numel() == 4
    assert first.cost.keys() == {"forwards", "backwards", "reward_calls", "reward_backwards", "decodes", "seconds",
                                 "peak_memory_bytes", "nfe"}  # fmt: skip


@pytest.mark.parametrize("name", ["digits", "digits-drift", "digits-guide", "digits-judge"])
def test_checkpoints_of_version_0_1_load(name):
    """Those that come with the package were written by it."""
    assert resolve_checkpoint(name).config["version"] == "0.1.0"
    x = torch.zeros(2, 1, 8, 8)
    if name in ("digits", "digits-drift"):
        assert mfm.MetaFlowMap.from_pretrained(name).drift(0.5, x).isfinite().all()
    else:
        assert load_classifier(name)(x).shape == (2, 10)
