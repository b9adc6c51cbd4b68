"""--device: what it means, alone and among ranks."""

import pytest
import torch

from metaflowmaps.errors import InputError
from metaflowmaps.work.devices import pick_device


def test_names_of_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="use --device cpu"):
        pick_device("cuda")
    with pytest.raises(InputError, match="unknown --device 'gpu'"):
        pick_device("gpu")


def test_every_rank_has_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device("auto") == torch.device("cuda")
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert chosen == [1, 1]
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="each rank needs its own"):
        pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="--nproc-per-node 2"):
        pick_device("auto")
