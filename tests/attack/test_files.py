"""Every kind of file that is read, damaged at random: refused in a line, or read as what it says; nothing in silence.

Where a hash or a checksum vouches for a file, what is read of a damaged one must be what was written. Where none does,
a changed number is another number: it must be read, or refused, without a traceback and in time. ``--seed`` makes other
damage.
"""

import gzip
import hashlib
import json
import random
import shutil
import struct
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file

import metaflowmaps as mfm
from metaflowmaps.checkpoint import read_checkpoint, write_checkpoint
from metaflowmaps.checkpoint.models import model_config
from metaflowmaps.data import DataSource, Latents
from metaflowmaps.data.latents import Encoding, LatentIndex, LatentShard
from metaflowmaps.data.sources import open_source, picture
from metaflowmaps.interop.pretrained.files import read_weights
from metaflowmaps.lab.report.html import read_results
from metaflowmaps.metrics.frechet import read_statistics
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.random import stream
from metaflowmaps.work.choices import build
from metaflowmaps.work.claims import claim, release
from metaflowmaps.work.shards import read_plan

pytestmark = [pytest.mark.attack, pytest.mark.filterwarnings("ignore")]
TRIES = 60  # a kind
MAX_SECONDS = 10.0  # of processor time a try; they take milliseconds


class Kind(NamedTuple):
    """A kind of file: how a good one is made in a folder, and what reading the folder gives."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    vouched: tuple[str, ...] = ()  # files that a hash or a checksum stands for


# -- what is read ----------------------------------------------------------------------------------------------------


def network() -> mfm.MetaFlowMap:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mfm.MetaFlowMap(MLPConfig(width=8, depth=2).network((2,)), mfm.LinearPath())


def make_checkpoint(folder: Path) -> None:
    model = network()
    documents = {"config.json": model_config(model), "position.json": {"step": 3, "score": 0.5}}
    write_checkpoint(folder / "it", {"model.safetensors": model.state_dict()}, documents)


def read_model(folder: Path) -> Any:
    read_checkpoint(folder / "it")
    return {name: value.tolist() for name, value in mfm.MetaFlowMap.from_pretrained(folder / "it").state_dict().items()}


def make_latents(folder: Path) -> None:
    n, shape = 6, (4, 2, 2)
    shards = []
    for k in range(2):
        mean = torch.randn(n, *shape, generator=stream(k)).half()
        held = {"mean": mean, "std": torch.ones(n, *shape).half(), "label": torch.arange(n) % 3}
        held |= {"sum": mean.double().sum(0), "square": (mean.double().square() + 1).sum(0)}
        data = save(held)
        (folder / f"latents-{k:05d}.safetensors").write_bytes(data)
        shards.append(LatentShard(f"latents-{k:05d}.safetensors", n, len(data), hashlib.sha256(data).hexdigest()))
    settings = Encoding("", "", 1.0, "float32")
    LatentIndex("x", "x", settings, shape, 2 * n, ("a", "b", "c"), 0, 0.0, 1.0, tuple(shards)).write(folder)


def read_latents(folder: Path) -> Any:
    x, labels = Latents(path=str(folder), labels=True).load()[0].sample_labelled(5, stream(0))
    return x.tolist(), labels.tolist()


RESULTS = {
    "schema": 1,
    "command": "sample",
    "config": {"a": [1, {"b": 2}]},
    "metrics": {"mean": 0.5},
    "cost": {"s": 1.0},
}
RESULTS |= {"environment": {"torch": "2", "device": "cpu"}, "invocation": "mfm sample"}


def make_results(folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps(RESULTS))


def make_statistics(folder: Path) -> None:
    np.savez_compressed(folder / "s.npz", mu=np.zeros(3), sigma=np.eye(3))


def make_steered(folder: Path) -> None:
    mfm.steer(network(), lambda x: x.sum(1), 2, mfm.MFMGF(num_draws=2), mfm.ODE(steps=2), seed=0).save(folder / "r")


def make_pictures(folder: Path) -> None:
    pixels = np.random.default_rng(0)
    for i, suffix in enumerate(("png", "jpg", "gif", "bmp", "webp")):
        Image.fromarray(pixels.integers(0, 255, (9, 8, 3), np.uint8)).save(folder / f"{i}.{suffix}")


def read_pictures(folder: Path) -> Any:
    parts = build(DataSource, "images", {"path": str(folder), "hold_out": 1, "size": 8}).load()
    return [part.tensor().tolist() for part in parts]


def read_encoded(folder: Path) -> Any:
    source = open_source(str(folder))
    return [picture(source, i, 8).tolist() for i in range(len(source))]


def make_tar(folder: Path) -> None:
    make_pictures(folder)
    with tarfile.open(folder / "set.tar", "w") as tar:
        for file in sorted(folder.glob("[0-9].*")):
            tar.add(file, f"class/{file.name}")
            file.unlink()


def read_tar(folder: Path) -> Any:
    source = open_source(str(folder / "set.tar"))
    return [picture(source, i, 8).tolist() for i in range(len(source))]


def make_mnist(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (6, 4, 4), np.uint8)
    head = struct.pack(">4B3I", 0, 0, 8, 3, 6, 4, 4)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, 6) + bytes(range(6)))
    )


def read_mnist(folder: Path) -> Any:
    return [part.tensor().tolist() for part in build(DataSource, "mnist", {"path": str(folder), "hold_out": 2}).load()]


def make_arrays(folder: Path) -> None:
    images = np.random.default_rng(0).random((5, 6, 6))
    np.savez_compressed(folder / "x.npz", images=images, labels=np.arange(5))


def read_arrays(folder: Path) -> Any:
    settings = {"path": str(folder / "x.npz"), "labels": True, "hold_out": 1}
    return [part.tensor().tolist() for part in build(DataSource, "images", settings).load()]


def make_claim(folder: Path) -> None:
    claim(folder, "sample", {"a": 1, "b": [2, None]})
    release(folder)
    make_results(folder)


def read_claim(folder: Path) -> Any:
    try:
        return claim(folder, "sample", {"a": 1, "b": [2, None]})
    finally:
        release(folder)


def make_plan(folder: Path) -> None:
    (folder / "plan.json").write_text(json.dumps({"size": 4, "names": ["00000"], "settings": {"a": 1}}))


def make_weights(folder: Path) -> None:
    save_file(network().state_dict(), folder / "w.safetensors")
    torch.save({"ema": network().state_dict(), "step": 3}, folder / "w.pt")


def read_both(folder: Path) -> Any:
    return [sorted(read_weights(folder / name)[0]) for name in ("w.safetensors", "w.pt")]


KINDS = {
    "checkpoint": Kind(make_checkpoint, read_model, ("it/model.safetensors", "it/config.json", "it/position.json")),
    "latents": Kind(make_latents, read_latents, ("latents-00000.safetensors", "latents-00001.safetensors")),
    "results": Kind(make_results, read_results),
    "statistics": Kind(make_statistics, lambda folder: read_statistics(folder / "s.npz")),
    "steered": Kind(make_steered, lambda folder: mfm.SteerResult.load(folder / "r")),
    "pictures": Kind(make_pictures, read_pictures),
    "pictures to encode": Kind(make_pictures, read_encoded),
    "tar": Kind(make_tar, read_tar),
    "mnist": Kind(make_mnist, read_mnist, ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")),
    "arrays": Kind(make_arrays, read_arrays),
    "claim": Kind(make_claim, read_claim),
    "plan": Kind(make_plan, read_plan),
    "weights": Kind(make_weights, read_both),
}

# -- damage ----------------------------------------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes as disks, networks and editors leave them."""
    at, length = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 16, 64])
    ways = {
        "bit": lambda: (
            data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if at < len(data) else b""
        ),
        "cut": lambda: data[:at],
        "zeros": lambda: data[:at] + bytes(min(length, len(data) - at)) + data[at + length :],
        "noise": lambda: data[:at] + rng.randbytes(min(length, len(data) - at)) + data[at + length :],
        "more": lambda: data[:at] + rng.randbytes(length) + data[at:],
        "less": lambda: data[:at] + data[at + length :],
        "twice": lambda: data + data,
        "empty": lambda: b"",
        "turned": lambda: data[at:] + data[:at],
    }
    return ways[rng.choice(list(ways))]()


ODD = [None, True, -1, 0, 1, 10**9, 10**30, 1e308, -0.5, "", "x", "../../etc/passwd", [], {}, [[]], {"a": []}, "9" * 50]


def changed(value: Any, rng: random.Random) -> Any:
    """JSON with one of its parts replaced, removed or added by somebody with intent."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], changed(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def attempt(kind: Kind, folder: Path, good: Any, vouched: bool) -> str:
    """What came of it: refused, read, or what must not be: silent, traceback, slow."""
    began, said = time.process_time(), "read"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = kind.read(folder)
        if vouched and held != good:
            said = "silent"
    except mfm.InputError as error:
        said = "refused" if "\n" not in str(error) else "traceback"
    except Exception as error:
        said = f"traceback: {type(error).__name__}: {str(error)[:200]}"
    return said if time.process_time() - began < MAX_SECONDS else f"slow, {said}"


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_refused_or_read(name, tmp_path, pytestconfig, record_property):
    kind, counts, failures = KINDS[name], Counter(), []
    rng = random.Random(f"{pytestconfig.getoption('--seed')} {name}")
    (tmp_path / "good").mkdir()
    kind.make(tmp_path / "good")
    good = kind.read(tmp_path / "good")
    files = sorted(str(f.relative_to(tmp_path / "good")) for f in (tmp_path / "good").rglob("*") if f.is_file())
    files = [file for file in files if not Path(file).name.startswith(".")]
    for number in range(TRIES):
        folder, file = tmp_path / "bad", rng.choice(files)
        shutil.copytree(tmp_path / "good", folder)
        data = (folder / file).read_bytes()
        if file.endswith(".json") and number % 2:
            spoiled = json.dumps(changed(json.loads(data), rng)).encode()
        else:
            spoiled = damaged(data, rng)
        (folder / file).write_bytes(spoiled)
        said = attempt(kind, folder, good, file in kind.vouched)
        counts[said.partition(":")[0]] += 1
        if said not in ("refused", "read"):
            failures.append(f"try {number}, {file}: {said}")
        shutil.rmtree(folder)
    record_property("attack", {"what": name, "tries": TRIES, **counts})
    assert not failures
    assert counts["refused"] >= TRIES // 6


def test_configurations_that_somebody_signed_again(tmp_path, pytestconfig, record_property):
    """Whoever can write a checkpoint can write its manifest: nothing is built beyond what is stored."""
    rng, counts, failures = random.Random(f"{pytestconfig.getoption('--seed')} signed"), Counter(), []
    make_checkpoint(tmp_path)
    config, manifest = tmp_path / "it/config.json", tmp_path / "it/manifest.json"
    good, listed = json.loads(config.read_text()), json.loads(manifest.read_text())
    kind = Kind(make_checkpoint, read_model)
    for number in range(4 * TRIES):
        data = json.dumps(changed(good, rng)).encode()
        config.write_bytes(data)
        listed["files"]["config.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        manifest.write_text(json.dumps(listed))
        said = attempt(kind, tmp_path, None, vouched=False)
        counts[said.partition(":")[0]] += 1
        if said not in ("refused", "read"):
            failures.append(f"try {number}, {data.decode()[:300]}: {said}")
    record_property("attack", {"what": "signed configurations", "tries": 4 * TRIES, **counts})
    assert not failures
