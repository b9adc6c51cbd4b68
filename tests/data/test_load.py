"""Digits, MNIST files and a user's own images: what comes in is what was on disk, and damage is one line."""

import gzip
import hashlib
import os
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metaflowmaps.data import DataSource, Digits, Mixture, limits, pictures, read_source
from metaflowmaps.data.load import DIGITS_FILE
from metaflowmaps.errors import InputError
from metaflowmaps.random import stream
from metaflowmaps.work.choices import build, built

SHARED = Path(os.environ.get("MFM_SHARED", Path(__file__).parents[3] / "shared")) / "data" / "mnist"
real_mnist = pytest.mark.skipif(
    not (SHARED / "t10k-images-idx3-ubyte.gz").is_file(),
    reason=f"needs MNIST's t10k-*-ubyte.gz in {SHARED}: set MFM_SHARED to the folder above data/mnist",
)


def load(name, path=None, **settings):
    return build(DataSource, name, settings if path is None else {**settings, "path": str(path)}).load()


def refused(name, path=None, **settings) -> str:
    """The message, which is one line."""
    with pytest.raises(InputError) as caught:
        load(name, path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


# -- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_the_repository():
    with np.load(DIGITS_FILE) as arrays:
        raw, labels = arrays["images"], arrays["labels"]
    # of scikit-learn 1.9's load_digits, cast to uint8
    assert hashlib.sha256(raw.tobytes() + labels.tobytes()).hexdigest() == (
        "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    )
    train, held_out = load("digits")
    assert (len(train), len(held_out), train.event_shape, train.num_classes) == (1500, 297, (1, 8, 8), 10)
    both = torch.cat([train.tensor(), held_out.tensor()])
    assert both.dtype == torch.float32
    # every image once with its label, at x/8 − 1 (exact in binary)
    expected = torch.from_numpy(raw).float()[:, None] / 8 - 1
    assert sorted(image.numpy().tobytes() for image in both) == sorted(i.numpy().tobytes() for i in expected)
    by_image = {i.numpy().tobytes(): int(c) for i, c in zip(expected, labels, strict=True)}
    for part in (train, held_out):
        assert [by_image[i.numpy().tobytes()] for i in part.tensor()] == part.labels.tolist()


def test_mean_and_spread():
    train, _ = load("digits")
    x = train.tensor().double()
    assert train.mean == pytest.approx(float(x.mean()), abs=1e-12)
    assert train.std == pytest.approx(float((x - x.mean()).square().mean().sqrt()), abs=1e-12)
    assert train.std == pytest.approx(0.752, abs=0.01)  # of all 1,797: 0.7521; a part of 1,500 is within 1 %


def test_the_sampler_is_a_function_of_the_generator():
    train, _ = load("digits")
    first = train.sample(64, stream(3, "batch"))
    train.sample(5, stream(4, "batch"))
    assert torch.equal(train.sample(64, stream(3, "batch")), first)
    assert not torch.equal(train.sample(64, stream(4, "batch")), first)
    x, labels = train.sample_labelled(64, stream(3, "batch"))
    assert torch.equal(x, first)
    known = {image.numpy().tobytes(): int(c) for image, c in zip(train.tensor(), train.labels, strict=True)}
    assert [known[image.numpy().tobytes()] for image in x] == labels.tolist()
    assert len(rows(train.sample(3000, stream(0, "many")))) > 1200  # of 1,500, 1 − e⁻² = 86 % are seen: 1,297


def test_the_split_is_fixed_and_disjoint_and_apart_from_limit():
    train, held_out = load("digits")
    again, held_again = load("digits")
    assert torch.equal(train.images, again.images)
    assert not rows(train.images) & rows(held_out.images)  # no two of the 1,797 are equal
    few, held_few = load("digits", limit=100)
    assert len(few) == 100
    assert rows(few.images) <= rows(train.images)
    assert torch.equal(held_few.images, held_out.images)
    assert torch.equal(held_again.images, held_out.images)
    assert len(load("digits", hold_out=5)[1]) == 5
    assert "at most 1,796" in refused("digits", hold_out=1797)
    assert "unknown option of digits 'size'" in refused("digits", size=16)


def test_one_line_for_the_user():
    line = Digits(limit=100).describe()
    for part in (
        "digits: 100 images to train on and 297 held out",
        "1×8×8",
        "mean -0.",
        "10 classes (0, 1",
        "not cond",
    ):
        assert part in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "digits", "path": "x"}, "unknown option of digits"),
        ({"name": "mnist", "channels": 3}, "unknown option of mnist"),
        ({"name": "cifar"}, "unknown data source 'cifar'"),
        ({"name": "images", "channels": 2}, "channels"),
        ({"name": "images", "limit": 0}, "limit"),
        ({"name": "images", "folder": "x"}, "folder"),
    ],
)
def test_impossible_settings(settings, said):
    with pytest.raises(InputError, match=said):
        built(DataSource, settings)


def test_what_version_0_1_kept_of_its_data_is_read():
    """Mixtures apart, and options of other sources as null; a tuned map's law is its own, whatever it began with."""
    old = {"name": "digits", "path": None, "size": None, "channels": None, "limit": 5, "hold_out": None, "labels": True}
    law = {"means": [[0.0], [1.0]], "covariances": 0.5, "weights": None, "labels": [0, 1]}
    assert read_source({"law": None, "data": old}) == Digits(limit=5, labels=True)
    assert read_source({"law": law, "data": None}) == Mixture(means=[[0.0], [1.0]], covariances=0.5, labels=[0, 1])
    assert read_source({"law": law, "data": old}).name == "mixture"
    assert read_source({}) is None


# -- MNIST -----------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, part: str = "t10k", count: int = 12, seed: int = 0, zipped: bool = False):
    """A tiny part: images (count, 4, 4), labels; returns both."""
    g = np.random.default_rng(seed)
    images, labels = g.integers(0, 256, (count, 4, 4), np.uint8), g.integers(0, 10, count, np.uint8)
    for stem, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        data = idx(array)
        (folder / (stem + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)
    return images, labels


def test_one_part_holds_out_its_last(tmp_path):
    images, labels = write_mnist(tmp_path)
    train, held_out = load("mnist", tmp_path, hold_out=3)
    assert np.array_equal(train.images[:, 0], images[:-3])
    assert np.array_equal(held_out.images[:, 0], images[-3:])
    assert train.labels.tolist() + held_out.labels.tolist() == labels.tolist()
    torch.testing.assert_close(train.tensor(), train.images / 255 * 2 - 1, rtol=0, atol=1e-6)  # roundings of float32
    few, held_few = load("mnist", tmp_path, hold_out=3, limit=4)
    assert len(few) == 4
    assert rows(few.images) <= rows(train.images)
    assert torch.equal(held_few.images, held_out.images)
    known = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    assert [known[image.numpy().tobytes()] for image in few.images] == few.labels.tolist()
    assert "at most 11" in refused("mnist", tmp_path)  # 1,000 by default


def test_two_parts_train_on_one_and_hold_out_the_first_of_the_other(tmp_path):
    images, labels = write_mnist(tmp_path, "train", 20, 1)
    others, other_labels = write_mnist(tmp_path, "t10k", 12, 2)
    train, held_out = load("mnist", tmp_path, hold_out=5)
    assert np.array_equal(train.images[:, 0], images)
    assert train.labels.tolist() == labels.tolist()
    assert np.array_equal(held_out.images[:, 0], others[:5])
    assert held_out.labels.tolist() == other_labels[:5].tolist()
    assert len(load("mnist", tmp_path)[1]) == 12
    assert "12" in refused("mnist", tmp_path, hold_out=13)


def test_gzip_and_raw_agree_whatever_the_name(tmp_path):
    for name, zipped in (("raw", False), ("zip", True)):
        (tmp_path / name).mkdir()
        write_mnist(tmp_path / name, zipped=zipped)
    (tmp_path / "misnamed").mkdir()
    for file in (tmp_path / "zip").iterdir():  # a browser's doing: still gzip, the ending lost
        shutil.copy(file, tmp_path / "misnamed" / file.name.removesuffix(".gz").replace("-idx", ".idx"))
    raw, *others = (load("mnist", tmp_path / name, hold_out=3) for name in ("raw", "zip", "misnamed"))
    for other in others:
        for one, two in zip(raw, other, strict=True):
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.labels, two.labels)


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes((data[place] ^ 0xFF,)) + data[place + 1 :]


DAMAGE = {
    "truncated": (lambda d: d[:-1], "truncated"),
    "trailing": (lambda d: d + b"\0", "trailing bytes"),
    "magic": (lambda d: b"\0\0\x0d\x03" + d[4:], "00000803"),
    "dimensions": (lambda d: d[:4] + b"\xff" * 12 + d[16:], "impossible dimensions"),
    "no images": (lambda d: d[:4] + b"\0" * 4 + d[8:], "impossible dimensions"),
    "header": (lambda d: d[:9], "truncated within its header"),
    "empty": (lambda d: b"", "truncated within its header"),
    "gzip cut": (lambda d: gzip.compress(d)[:-12], "damaged gzip"),
    "gzip sum": (lambda d: flip(gzip.compress(d), -6), "damaged gzip"),
    "gzip head": (lambda d: flip(gzip.compress(d), 2), "damaged gzip"),
    "gzip body": (lambda d: flip(gzip.compress(d), 10), "damaged gzip"),
    "gzip of a truncated file": (lambda d: gzip.compress(d[:-1]), "truncated"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_named(tmp_path, kind):
    write_mnist(tmp_path)
    file = tmp_path / "t10k-images-idx3-ubyte"
    damage, said = DAMAGE[kind]
    file.write_bytes(damage(file.read_bytes()))
    message = refused("mnist", tmp_path, hold_out=3)
    assert str(file) in message
    assert said in message
    assert "--set data.path" in message


def test_labels_that_do_not_belong(tmp_path):
    write_mnist(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(11, np.uint8)))
    message = refused("mnist", tmp_path, hold_out=3)
    assert str(labels) in message
    assert "11 labels for the 12 images" in message
    labels.write_bytes(idx(np.full(12, 10, np.uint8)))
    assert "label 10" in refused("mnist", tmp_path, hold_out=3)
    labels.unlink()
    message = refused("mnist", tmp_path, hold_out=3)
    assert "t10k-labels-idx1-ubyte" in message
    assert str(tmp_path) in message


def test_no_files(tmp_path):
    message = refused("mnist", tmp_path)
    assert str(tmp_path) in message
    assert "train-images-idx3-ubyte" in message
    assert "--set data.path" in message
    assert "--set data.path" in refused("mnist")
    assert "nowhere" in refused("mnist", tmp_path / "nowhere")


def test_parts_of_different_sets(tmp_path):
    write_mnist(tmp_path, "train", 20)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((12, 5, 5), np.uint8)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(12, np.uint8)))
    assert "different data sets" in refused("mnist", tmp_path)


@real_mnist
def test_real_mnist_against_its_files():
    train, held_out = load("mnist", SHARED)
    assert (len(train), len(held_out), train.event_shape) == (9000, 1000, (1, 28, 28))
    raw = gzip.decompress((SHARED / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    images = np.frombuffer(raw, np.uint8).reshape(-1, 1, 28, 28)
    assert np.array_equal(torch.cat([train.images, held_out.images]), images)
    # 0.1307 is the mean of MNIST's train part in [0, 1], 0.1325 of this one
    mean = (train.mean * 9000 + held_out.mean * 1000) / 10000
    assert (mean + 1) / 2 == pytest.approx(images.mean() / 255, abs=1e-9)
    assert (mean + 1) / 2 == pytest.approx(0.1325, abs=1e-4)
    assert train.std == pytest.approx(2 * images[:9000].std() / 255, abs=1e-6)
    published = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert torch.bincount(torch.cat([train.labels, held_out.labels])).tolist() == published


@real_mnist
def test_real_mnist_unpacked(tmp_path):
    for file in SHARED.glob("*.gz"):
        (tmp_path / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    assert torch.equal(load("mnist", tmp_path)[0].images, load("mnist", SHARED)[0].images)


# -- images: files ---------------------------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def test_files_come_back_as_they_were(tmp_path):
    saved = [
        save(tmp_path / ("deep" * (i % 2)) / f"{i:02}.{e}", noise(6, 6, 3, seed=i))
        for i, e in enumerate(["png", "BMP"] * 6)
    ]
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    train, held_out = load("images", tmp_path)
    assert (len(train), len(held_out), train.event_shape, train.labels) == (11, 1, (3, 6, 6), None)
    expected = {np.ascontiguousarray(np.moveaxis(x, 2, 0)).tobytes() for x in saved}
    assert rows(train.images.contiguous()) | rows(held_out.images.contiguous()) == expected
    assert not rows(train.images) & rows(held_out.images)
    assert float(train.tensor().min()) >= -1
    assert float(train.tensor().max()) <= 1
    few, held_few = load("images", tmp_path, limit=3)
    assert len(few) == 3
    assert torch.equal(held_few.images, held_out.images)


def test_crop_to_the_centre(tmp_path):
    wide = np.zeros((4, 10), np.uint8)
    wide[:, 3:7] = noise(4, 4)  # the square in the middle
    for i in range(2):
        save(tmp_path / f"{i}.png", wide)
        save(tmp_path / f"{i + 2}.png", wide.T)
    train, _ = load("images", tmp_path)
    assert train.event_shape == (1, 4, 4)
    assert rows(train.images) == {wide[:, 3:7].tobytes(), np.ascontiguousarray(wide[:, 3:7].T).tobytes()}


def test_resize_is_antialiased(tmp_path):
    """A fine checkerboard shrunk is grey: sampling without averaging would keep it black or white."""
    board = ((np.add.outer(np.arange(32), np.arange(32)) % 2) * 255).astype(np.uint8)
    for i in range(3):
        save(tmp_path / f"{i}.png", board)
    save(tmp_path / "3.png", noise(32, 32))
    train, held_out = load("images", tmp_path, size=8)
    flat = [x for x in torch.cat([train.images, held_out.images]) if float(x.float().std()) < 10]
    assert len(flat) == 3
    assert float(torch.stack(flat).float().sub(127.5).abs().max()) < 10  # bicubic leaves a few levels at the edge


def test_size_and_channels_are_those_of_most_files(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", noise(5, 9, seed=i))
    save(tmp_path / "4.png", noise(30, 30))
    assert load("images", tmp_path)[0].event_shape == (1, 5, 5)
    save(tmp_path / "5.png", noise(5, 5, 3))
    train, _ = load("images", tmp_path)
    assert train.event_shape == (3, 5, 5)
    assert load("images", tmp_path, channels=1, size=7)[0].event_shape == (1, 7, 7)


def test_large_images_are_capped_with_a_message(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.png", noise(70, 80, seed=i))
    with pytest.warns(UserWarning, match=r"resized to 64: --set data\.size=70"):
        assert load("images", tmp_path)[0].event_shape == (1, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("images", tmp_path, size=70)[0].event_shape == (1, 70, 70)


def test_transparent_is_white_and_turned_is_upright(tmp_path):
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = 255  # upper half opaque white; lower half clear black
    clear[0, 0] = (10, 20, 30, 255)
    exif = Image.Exif()
    exif[0x0112] = 3  # turned upside down
    save(tmp_path / "0.png", clear)
    save(tmp_path / "1.png", np.rot90(clear[:, :, :3], 2).copy(), exif=exif)
    train, held_out = load("images", tmp_path)
    both = torch.cat([train.images, held_out.images])
    assert sorted(both.sum((1, 2, 3)).tolist()) == [
        60 + 7 * 765,
        60 + 15 * 765,
    ]  # the file without alpha keeps its black
    for image in both:
        assert image[:, 0, 0].tolist() == [10, 20, 30]


def test_subfolders_are_classes(tmp_path):
    for i, (name, level) in enumerate([("cat", 10), ("dog", 90), ("ant", 200)] * 4):
        save(tmp_path / name / ("more" * (i % 2)) / f"{i}.png", np.full((3, 3), level, np.uint8) + np.uint8(i))
    train, held_out = load("images", tmp_path, labels=True, hold_out=4)
    assert train.class_names == held_out.class_names == ("ant", "cat", "dog")
    for part in (train, held_out):
        levels = part.images[:, 0, 0, 0] // 80  # 0: cat, 1: dog, 2: ant
        assert part.labels.tolist() == [{2: 0, 0: 1, 1: 2}[int(level)] for level in levels]
    assert load("images", tmp_path)[0].labels is None
    save(tmp_path / "stray.png", noise(3, 3))
    message = refused("images", tmp_path, labels=True)
    assert "stray.png" in message
    assert "data.labels=false" in message


def test_files_that_cannot_be_read_are_named(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", noise(16, 16, seed=i))
    whole = (tmp_path / "0.png").read_bytes()
    for damage in (whole[:-30], whole[:60] + bytes(20) + whole[80:], b"GIF89a", b""):
        (tmp_path / "0.png").write_bytes(damage)
        message = refused("images", tmp_path)
        assert str(tmp_path / "0.png") in message
        assert "replace or remove it" in message
    save(tmp_path / "0.png", noise(16, 16).astype(np.uint16))
    assert "8 bits" in refused("images", tmp_path)


def test_colour_beyond_the_files_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "LOOKED_AT", 1)
    for i in range(3):
        save(tmp_path / f"{i}.png", noise(4, 4, seed=i))
    looked_at = int(torch.randperm(3, generator=stream(0, "data-look"))[0])
    other = tmp_path / f"{(looked_at + 1) % 3}.png"
    save(other, noise(4, 4, 3))
    message = refused("images", tmp_path)
    assert other.name in message
    assert "data.channels=3" in message


def test_nothing_to_load(tmp_path):
    save(tmp_path / "0.png", noise(4, 4))
    assert "at least 2" in refused("images", tmp_path)
    save(tmp_path / "1.png", noise(4, 4))
    assert "is neither" in refused("images", tmp_path / "0.png")
    assert "there is no" in refused("images", tmp_path / "nowhere")
    assert "--set data.path" in refused("images")
    for i in range(2):
        save(tmp_path / f"{i}.png", np.full((4, 4), 7, np.uint8))
    assert "one colour" in refused("images", tmp_path)


def test_memory_is_bounded_and_the_way_out_works(tmp_path, monkeypatch):
    for i in range(30):
        save(tmp_path / f"{i}.png", noise(4, 4, seed=i))
    monkeypatch.setattr(limits, "MAX_BYTES", 20 * 16)
    message = refused("images", tmp_path)
    assert message.endswith("--set data.limit=17")
    assert [len(part) for part in load("images", tmp_path, limit=17)] == [17, 3]
    message = refused("images", tmp_path, hold_out=25)
    assert message.endswith("--set data.limit=17 --set data.hold_out=3")
    refused("images", tmp_path, limit=18)


# -- images: arrays --------------------------------------------------------------------------------------------------


def test_layouts_of_arrays_agree(tmp_path):
    x = noise(20, 6, 6, 3)
    np.save(tmp_path / "last.npy", x)
    np.save(tmp_path / "first.npy", np.moveaxis(x, 3, 1))
    np.save(tmp_path / "grey.npy", x[..., 0])
    np.savez_compressed(tmp_path / "a.npz", images=x)
    parts = {name: load("images", tmp_path / name) for name in ("last.npy", "first.npy", "a.npz", "grey.npy")}
    train, held_out = parts["last.npy"]
    assert (len(train), len(held_out), train.event_shape) == (18, 2, (3, 6, 6))
    assert rows(train.images) | rows(held_out.images) == rows(torch.from_numpy(np.moveaxis(x, 3, 1).copy()))
    for name in ("first.npy", "a.npz"):
        assert torch.equal(parts[name][0].images, train.images)
    assert torch.equal(parts["grey.npy"][0].images, train.images[:, :1])
    as_colour, _ = load("images", tmp_path / "grey.npy", channels=3)
    assert torch.equal(as_colour.images, train.images[:, :1].expand(-1, 3, -1, -1))
    as_grey, _ = load("images", tmp_path / "last.npy", channels=1)
    luma = torch.einsum("nchw,c->nhw", train.images.double(), torch.tensor([0.299, 0.587, 0.114]).double())
    assert float((as_grey.images[:, 0] - luma).abs().max()) <= 0.5 + 1e-4  # rounded to a level, in float32


def test_ranges_of_floats(tmp_path):
    unit = np.random.default_rng(0).random((10, 4, 4))
    np.save(tmp_path / "unit.npy", unit)
    np.save(tmp_path / "signed.npy", (2 * unit - 1).astype(np.float32))
    one, two = (load("images", tmp_path / f"{name}.npy")[0] for name in ("unit", "signed"))
    assert one.images.dtype == torch.float32
    torch.testing.assert_close(one.tensor(), two.tensor(), rtol=0, atol=2e-7)  # roundings of float32
    distances = (one.tensor()[:, 0, None] - torch.from_numpy(2 * unit - 1)).abs().amax((2, 3))
    assert float(distances.amin(1).max()) < 2e-7
    assert len(set(distances.argmin(1).tolist())) == 9
    np.save(tmp_path / "edges.npy", (unit > 0.5).astype(np.float32).repeat(2, 1))
    wide, _ = load("images", tmp_path / "edges.npy", size=9)
    assert wide.event_shape == (1, 9, 9)
    assert float(wide.tensor().abs().max()) == 1  # bicubic would overshoot


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.ones((5, 4, 4)) * np.nan, "NaN or infinite"),
        (np.full((5, 4, 4), np.inf), "NaN or infinite"),
        (np.linspace(0, 255, 80).reshape(5, 4, 4), "floats from 0 to 255"),
        (np.linspace(-0.01, 1, 80).reshape(5, 4, 4), "clip or rescale"),
        (np.linspace(-1, 1.01, 80).reshape(5, 4, 4), "clip or rescale"),
        (np.arange(80).reshape(5, 4, 4), "int64"),
        (noise(5, 4, 4) % 2, "never exceeds 1"),
        (noise(5, 4, 4) > 9, "bool"),
        (noise(5, 4), "has shape (5, 4)"),
        (noise(5, 4, 4, 4), "has shape (5, 4, 4, 4)"),
        (noise(5, 3, 4, 1), "first or last"),
        (noise(5, 0, 4), "has shape (5, 0, 4)"),
        (noise(1, 4, 4), "at least 2"),
        (np.uint8(3), "at least 2"),
    ],
)
def test_arrays_that_cannot_be_read_as_images(tmp_path, array, said):
    np.save(tmp_path / "x.npy", array)
    message = refused("images", tmp_path / "x.npy")
    assert "x.npy" in message
    assert said in message


class Planted:
    """Unpickling it would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_nothing_is_ever_unpickled(tmp_path):
    mark = tmp_path / "mark"
    np.save(tmp_path / "x.npy", np.array([Planted(mark)] * 4, object), allow_pickle=True)
    np.savez(tmp_path / "x.npz", images=noise(5, 4, 4), labels=np.array([Planted(mark)] * 5, object))
    assert "x.npy cannot be read" in refused("images", tmp_path / "x.npy")
    assert "x.npz cannot be read" in refused("images", tmp_path / "x.npz", labels=True)
    assert not mark.exists()


def test_labels_of_archives(tmp_path):
    x, y = noise(12, 4, 4), np.array([5, 7, 9] * 4)
    x[:, 0, 0] = y
    np.savez(tmp_path / "a.npz", x=x, y=y)
    train, held_out = load("images", tmp_path / "a.npz", labels=True, hold_out=3)
    assert train.class_names == ("5", "7", "9")
    for part in (train, held_out):
        assert [int(part.class_names[c]) for c in part.labels] == part.images[:, 0, 0, 0].tolist()
    assert load("images", tmp_path / "a.npz")[0].num_classes == 0
    for bad in (y[:-1], y / 2, y[:, None]):
        np.savez(tmp_path / "b.npz", images=x, labels=bad)
        assert "b.npz: labels of shape" in refused("images", tmp_path / "b.npz", labels=True)
    np.savez(tmp_path / "c.npz", pictures=x)
    assert "holds pictures: images (or x)" in refused("images", tmp_path / "c.npz")
    np.save(tmp_path / "d.npy", x)
    assert "holds no labels" in refused("images", tmp_path / "d.npy", labels=True)


@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"text" * 9, zlib.compress])
def test_damaged_arrays_are_named(tmp_path, damage):
    np.save(tmp_path / "x.npy", noise(9, 4, 4))
    np.savez_compressed(tmp_path / "x.npz", images=noise(9, 4, 4))
    for name in ("x.npy", "x.npz"):
        (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
        assert f"{name} cannot be read" in refused("images", tmp_path / name)


def test_flipped_bytes_inside_an_archive_are_named(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=noise(9, 40, 40))
    data = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(flip(data, len(data) // 2))
    assert "x.npz cannot be read" in refused("images", tmp_path / "x.npz")


def test_archives_that_unpack_beyond_the_bound(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((100, 8, 8), np.uint8))
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    message = refused("images", tmp_path / "x.npz")
    assert ".npy" in message
    assert "data.limit" in message
