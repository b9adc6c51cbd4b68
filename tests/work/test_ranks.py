"""What the environment says of ranks, and what is said where they do not find or lose each other."""

import time

import pytest
from torch import distributed as dist

from metaflowmaps.errors import InputError
from metaflowmaps.work import ranks
from metaflowmaps.work.launch import Launch, launched

TOLD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def tell(monkeypatch):
    """Sets what torchrun would."""

    def told(**changed: str) -> None:
        for name, value in {**TOLD, **changed}.items():
            monkeypatch.setenv(name, value)

    return told


@pytest.mark.parametrize(
    "changed", [{"RANK": "x"}, {"RANK": "-1"}, {"RANK": "5"}, {"RANK": "2"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "1.5"}]
)
def test_ranks_that_cannot_be_are_refused(changed, tell, command):
    tell(**changed)
    with pytest.raises(InputError, match="unset RANK to run alone"):
        launched()
    code, _, err = command("recipes")
    assert (code, err.count("\n")) == (2, 1)
    assert "WORLD_SIZE" in err


def test_ranks_that_can_be(tell):
    tell()
    assert launched() == Launch(1, 2, 1)


def test_a_rank_that_waits_says_for_whom(tell, monkeypatch, capsys):
    tell()
    monkeypatch.setattr(ranks, "SILENT_SECONDS", 0.01)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: time.sleep(0.3))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with ranks.session():
        pass
    assert capsys.readouterr().err == "rank 1 waits for the other 1 at 127.0.0.1:29500: are all of them started?\n"
    assert ranks.SILENT_SECONDS < 10


def test_a_port_that_is_taken_is_one_line(tell, monkeypatch):
    def taken(*_, **__):
        raise dist.DistNetworkError("The server socket has failed to listen: EADDRINUSE\nmore")

    tell(RANK="0")
    monkeypatch.setattr(dist, "init_process_group", taken)
    with pytest.raises(InputError, match="--master-port") as caught, ranks.session():
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", ["[../gloo/transport/tcp/pair.cc:544] Connection closed by peer [::1]:1", "other"])
def test_a_rank_that_is_gone_is_told_from_other_errors(said, tell, monkeypatch):
    tell()
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with pytest.raises(RuntimeError) as caught, ranks.session():
        raise RuntimeError(said)
    assert isinstance(caught.value, ranks.RankLost) == ("peer" in said)
