"""Folders that never end, pipes and devices in the place of pictures: each path once, regular files alone, bounded."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metaflowmaps._files import read_regular
from metaflowmaps.data import DataSource, sources
from metaflowmaps.data.sources import BadPicture, open_source, picture
from metaflowmaps.errors import InputError
from metaflowmaps.metrics.frechet import read_statistics
from metaflowmaps.work.choices import build

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures in two classes."""
    pixels = np.random.default_rng(0)
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / "set" / name)
    return tmp_path / "set"


def found(folder: Path) -> tuple[int, int]:
    """How many pictures are encoded, and how many trained on."""
    trained = build(DataSource, "images", {"path": str(folder), "hold_out": 1, "labels": True}).load()
    return len(open_source(str(folder))), sum(map(len, trained))


def test_a_linked_folder_is_read(folder):
    (folder / "c").symlink_to(folder.parent / "elsewhere")
    (folder / "a").rename(folder.parent / "elsewhere")
    assert found(folder) == (3, 3)


@pytest.mark.parametrize("loops", [1, 2])
def test_a_folder_within_itself_is_entered_once(folder, loops):
    for i in range(loops):
        (folder / "a" / f"loop{i}").symlink_to(folder)
        (folder / "b" / f"loop{i}").symlink_to(folder / "a")
    assert found(folder) == (3, 3)


def test_pipes_and_devices_are_no_pictures(folder):
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "b" / "zero.png").symlink_to("/dev/zero")
    (folder / "b" / "gone.png").symlink_to(folder / "nowhere")
    assert found(folder) == (3, 3)


def test_a_picture_that_becomes_a_pipe_or_too_large_is_a_bad_one(folder, monkeypatch):
    source, second = open_source(str(folder)), folder / "a" / "2.png"
    second.unlink()
    os.mkfifo(second)
    with pytest.raises(BadPicture, match="no regular file"):
        picture(source, 1, 8)
    monkeypatch.setattr(sources, "MAX_BYTES", 10)
    with pytest.raises(BadPicture, match="bytes, and at most 10"):
        picture(source, 0, 8)


@pytest.mark.parametrize("name", ["pipe.npy", "zero.npz"])
def test_an_array_that_is_no_file_is_refused_unread(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="there is no file"):
        build(DataSource, "images", {"path": str(tmp_path / name)}).load()


def test_regular_files_are_read_up_to_a_bound(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(InputError, match="at most 4 are read"):
        read_regular(tmp_path / "file", 4)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="no regular file"):
            read_regular(place)


def damaged_statistics(tmp_path: Path) -> dict[str, Path]:
    good = tmp_path / "good.npz"
    np.savez_compressed(good, mu=np.zeros(3), sigma=np.eye(3))
    data = good.read_bytes()
    made = {"cut": data[: len(data) // 2], "empty": b"", "flipped": data[:70] + bytes(20) + data[90:]}
    for name, content in made.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.savez(tmp_path / "pickled.npz", mu=np.array([print, None]), sigma=np.eye(2))
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "words.npz", mu=np.array(["a"]), sigma=np.array([["b"]]))
    os.mkfifo(tmp_path / "pipe.npz")
    return {file.name: file for file in tmp_path.iterdir() if file != good}


def test_statistics_that_are_damaged_are_refused_in_a_line(tmp_path):
    files = damaged_statistics(tmp_path)
    assert len(files) == 7
    for file in files.values():
        with pytest.raises(InputError, match="with mu") as caught:
            read_statistics(file)
        assert "\n" not in str(caught.value)
    assert torch.equal(read_statistics(tmp_path / "good.npz").mean, torch.zeros(3, dtype=torch.float64))
