"""Code that a checkpoint names is run where its user has chosen it: typed, imported or listed."""

import os
import sys

import pytest

import metaflowmaps as mfm
from metaflowmaps.checkpoint import CheckpointError, write_checkpoint
from metaflowmaps.data import read_source
from metaflowmaps.errors import InputError
from metaflowmaps.networks import MLPConfig, NetworkConfig, read_network
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.training.starting import _as_read
from metaflowmaps.work import choices, own_code

NET = """
from metaflowmaps.networks import MLPConfig
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
class Net(MLPConfig):
    name = "net"
"""


@pytest.fixture(autouse=True)
def stranger(tmp_path, monkeypatch):
    """A user who has typed nothing yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(own_code.ALLOWED, raising=False)


def forget(monkeypatch):
    """As in another process: nothing is imported yet."""
    for name in [n for n in sys.modules if n.startswith(choices._OUTSIDE)]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint that names ``net.py:Net`` beside it, by its absolute path, as a stranger may have written it."""
    model = mfm.MetaFlowMap(MLPConfig(width=4, depth=1).network((2,)), mfm.LinearPath())
    (tmp_path / "net.py").write_text(NET)
    described = model.describe()
    described["network"]["name"] = f"{tmp_path / 'net.py'}:Net"
    config = {"format": 1, "kind": model.kind, **described}
    write_checkpoint(tmp_path / "saved", {"model.safetensors": model.state_dict()}, {"config.json": config})
    forget(monkeypatch)
    return tmp_path / "saved"


def test_a_checkpoint_runs_no_code_that_its_user_never_chose(checkpoint, tmp_path):
    named = f"{tmp_path / 'net.py'}:Net"
    with pytest.raises(CheckpointError, match=r"names .*net\.py, code that you have not run .* MFM_CODE=\S+net\.py"):
        mfm.MetaFlowMap.from_pretrained(checkpoint)
    with pytest.raises(InputError, match="code that you have not run"):
        read_source({"data": {"name": named}})
    _as_read(gmm(), "model", {**gmm().model.model_dump(), "network": named})  # what does not fit is compared as it is
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_imports_no_module_that_is_not_there_yet(tmp_path, monkeypatch):
    (tmp_path / "strangers_net.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    described = {"name": "strangers_net:Net", "event_shape": [2]}
    with pytest.raises(InputError, match="MFM_CODE=strangers_net before"):
        read_network(described)
    assert not (tmp_path / "ran").exists()
    __import__("strangers_net")
    assert read_network(described)[1] == (2,)
    sys.modules.pop("strangers_net")


def test_what_was_typed_before_is_loaded_until_it_is_changed(checkpoint, tmp_path, monkeypatch):
    choices.choose(NetworkConfig, f"{tmp_path / 'net.py'}:Net")
    forget(monkeypatch)
    mfm.MetaFlowMap.from_pretrained(checkpoint)
    forget(monkeypatch)
    (tmp_path / "net.py").write_text(NET + "# another\n")
    with pytest.raises(CheckpointError, match="names"):
        mfm.MetaFlowMap.from_pretrained(checkpoint)
    monkeypatch.setenv(own_code.ALLOWED, os.pathsep.join(["mypackage", str(tmp_path / "net.py")]))
    mfm.MetaFlowMap.from_pretrained(checkpoint)
    assert (tmp_path / "ran").exists()
