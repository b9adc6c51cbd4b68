"""What the environment says of ranks, and what is said where they do not find or lose each other."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from torch import distributed as dist

from conftest import TINY
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


def test_a_rank_that_does_not_answer_is_waited_for_as_long_as_was_said(tell, monkeypatch):
    waited = []
    tell()
    monkeypatch.setattr(dist, "init_process_group", lambda *_, timeout: waited.append(timeout.total_seconds()))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for given in ("", "45"):
        monkeypatch.setenv(ranks.PATIENCE, given)
        with ranks.session():
            pass
    assert waited == [600, 45]
    for wrong in ("0", "-1", "1.5", "soon", "10000000"):
        monkeypatch.setenv(ranks.PATIENCE, wrong)
        with pytest.raises(InputError, match=f"MFM_RANK_SECONDS={wrong}: give whole seconds"), ranks.session():
            pass


@pytest.mark.attack
@pytest.mark.parametrize(("sign", "seconds"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 40)], ids=["killed", "stopped"])
def test_a_rank_that_is_lost_ends_the_other_in_a_line(tmp_path, sign, seconds):
    """Without torchrun, which would see to it: at once, where a connection breaks; 10 s allow for a busy machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "metaflowmaps.cli", "train", "gmm", *TINY, "--set", "loss.diagonal_share=0.5"]
    ranks_of = []
    for rank in ("0", "1"):
        told = {**TOLD, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port, ranks.PATIENCE: "40"}
        ranks_of.append(
            subprocess.Popen(
                [*command, "--out", "run"], cwd=tmp_path, env={**os.environ, **told}, stderr=subprocess.PIPE, text=True
            )
        )
    first, second = ranks_of
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    second.send_signal(sign)
    try:
        err = first.communicate(timeout=seconds + 10)[1]
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 1
    assert "another rank is gone" in err.splitlines()[-1]
    assert "Traceback" not in err
