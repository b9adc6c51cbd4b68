"""Pictures to latent shards and back out: every source alike, killed anywhere, shared among workers, drawn anew."""

import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.synthetic_pictures import write_synthetic
from PIL import Image
from safetensors.torch import load_file, save

from metaflowmaps._files import STALE_SECONDS
from metaflowmaps.data import DataSource, Latents
from metaflowmaps.data.latents import INDEX, Encoding, LatentIndex, LatentShard, read_index, verify
from metaflowmaps.data.sources import centre_crop, open_source, picture
from metaflowmaps.errors import InputError
from metaflowmaps.imagenet_names import wnids
from metaflowmaps.interop.encode_latents import Plan, encode
from metaflowmaps.random import stream
from metaflowmaps.work import shards as sharding
from metaflowmaps.work.choices import built
from metaflowmaps.work.shards import Worker
from tiny_codec import tiny_codec

SIZE, SHARD = 32, 4
# float16 keeps 11 bits of values below 1; convolutions of another batch size differ by 2e-5 (test_autoencoder.py)
STORED = 2.0**-11 + 2e-5


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of five pictures, in ImageNet's layout; no two of a size."""
    root = tmp_path_factory.mktemp("pictures")
    write_synthetic(root / "made" / "train", 3, 5, 40, seed=1)
    for i, file in enumerate(sorted((root / "made").rglob("*.png"))):
        with Image.open(file) as image:
            image.resize((40 + 3 * i, 70 - 2 * i)).save(file)
    return root / "made"


@pytest.fixture(scope="module")
def whole(folder, codec, tmp_path_factory) -> Path:
    """The folder encoded without interruption, with flips."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    assert run(folder, codec, out) is not None
    return out


def plan(source, codec, out, skip_bad=False, classes="auto", batch_size=3, **settings) -> Plan:
    pictures = open_source(str(source), classes)
    made = {"size": SIZE, "flip": True, "shard_size": SHARD, **settings}
    full = Encoding(pictures.fingerprint, codec.identity, codec.scale, "float32", **made)
    return Plan(pictures, codec, full, out, batch_size, skip_bad, threads=2)


def run(source, codec, out, worker=None, verify=False, say=lambda line: None, **options):
    return encode(plan(source, codec, out, **options), {"source": "x", "vae": "tiny"}, worker, verify, say)


def content(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """What all shards hold, in order."""
    parts = [load_file(out / shard.file) for shard in read_index(out).shards]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name not in ("sum", "square")}


def load(out, **settings):
    return Latents(path=str(out), **settings).load()


def refused(act) -> str:
    """The message, which is one line."""
    with pytest.raises(InputError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- what is encoded -------------------------------------------------------------------------------------------------


def reference_crop(image: Image.Image, size: int) -> np.ndarray:
    """By numpy and Pillow's own box argument: halve by means of 2 × 2, resize what will be the centre, and no more."""
    x = np.asarray(image.convert("RGB")).astype(float)
    while min(x.shape[:2]) >= 2 * size:
        h, w = x.shape[0] // 2, x.shape[1] // 2
        x = np.rint(x[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3).mean((1, 3)))
    h, w = x.shape[:2]
    scale = size / min(h, w)
    wide, high = round(w * scale), round(h * scale)
    left, upper = (wide - size) // 2, (high - size) // 2
    box = (left * w / wide, upper * h / high, (left + size) * w / wide, (upper + size) * h / high)
    return np.asarray(Image.fromarray(x.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC, box=box))


@pytest.mark.parametrize("shape", [(32, 32), (48, 40), (300, 200), (200, 304), (64, 64), (256, 1024), (20, 31)])
def test_the_crop_is_that_of_an_independent_reference(shape):
    g = np.random.default_rng(0)
    rough = Image.fromarray(g.integers(0, 256, (*shape[::-1], 3), np.uint8))
    ours = np.asarray(centre_crop(rough, SIZE)).astype(int)
    assert ours.shape == (SIZE, SIZE, 3)
    # each halving rounds a half to one side or the other, the bicubic weights add up to 1.3 in size: 3 levels at most
    assert np.abs(ours - reference_crop(rough, SIZE)).max() <= 3
    assert np.ptp(ours) > 10


def test_an_odd_size_is_halved_downwards():
    assert centre_crop(Image.new("RGB", (131, 67)), SIZE).size == (SIZE, SIZE)
    assert centre_crop(Image.new("RGB", (7, 501)), SIZE).size == (SIZE, SIZE)


def test_shards_hold_the_encoded_crops_their_mirror_images_and_their_classes(whole, folder, codec):
    held = tensors(whole)
    files = sorted((folder / "train").rglob("*.png"))
    crops = [torch.from_numpy(reference_crop(Image.open(file), SIZE).copy()) for file in files]
    x = torch.stack(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    for images, sides in ((x, ("mean", "std")), (x.flip(-1), ("mean_flipped", "std_flipped"))):
        for name, exact in zip(sides, codec.encode(images), strict=True):
            assert held[name].dtype == torch.float16
            # crops of the reference are off by a level or two here and there: 2/127.5, times the encoder's slope (~1)
            torch.testing.assert_close(held[name].float(), exact, rtol=0, atol=STORED + 0.02)
    ours = open_source(str(folder))
    x = torch.stack([torch.from_numpy(picture(ours, i, SIZE)) for i in range(15)]).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(held["mean"].float(), codec.encode(x)[0], rtol=0, atol=STORED)
    torch.testing.assert_close(held["mean_flipped"].float(), codec.encode(x.flip(-1))[0], rtol=0, atol=STORED)
    assert float((held["mean"] - held["mean_flipped"]).abs().max()) > 20 * STORED
    index = read_index(whole)
    assert index.classes == tuple(sorted({file.parent.name for file in files}))
    assert held["label"].tolist() == [index.classes.index(file.parent.name) for file in files]
    assert [shard.examples for shard in index.shards] == [4, 4, 4, 3]


def test_mean_and_spread_are_those_of_what_is_drawn(whole):
    held = {name: x.double() for name, x in tensors(whole).items()}
    index = read_index(whole)
    mean = (held["mean"].mean() + held["mean_flipped"].mean()) / 2
    square = sum(held[name].square().mean() / 2 for name in ("mean", "std", "mean_flipped", "std_flipped"))
    assert index.mean == pytest.approx(float(mean), abs=1e-12)
    assert index.std == pytest.approx(float((square - mean**2).sqrt()), rel=1e-9)
    train, held_out = load(whole)
    assert (train.mean, train.std) == (held_out.mean, held_out.std)
    assert train.mean == pytest.approx(index.mean, abs=1e-12)
    assert train.std == pytest.approx(index.std, rel=1e-9)
    both = (held["mean"] + held["mean_flipped"]).mean(0) / 2
    torch.testing.assert_close(train.mean_image.double(), both, rtol=0, atol=1e-6)  # float32


# -- sources ---------------------------------------------------------------------------------------------------------


def tar_of(folder: Path, file: Path, prefix: str = "", flat: bool = False) -> Path:
    with tarfile.open(file, "w") as tar:
        for member in sorted(folder.rglob("*.png"), reverse=True):  # a tar has an order of its own
            name = member.name if flat else member.relative_to(folder).as_posix()
            tar.add(member, prefix + name)
    return file


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def as_tar(folder, at):
    return tar_of(folder, at / "set.tar", "./")


def as_tar_of_tars(folder, at):
    with tarfile.open(at / "outer.tar", "w") as outer:
        for place in sorted((folder / "train").iterdir()):
            outer.add(tar_of(place, at / f"{place.name}.tar.part", flat=True), f"{place.name}.tar")
    return at / "outer.tar"


def as_folder_of_tars(folder, at):
    for place in (folder / "train").iterdir():
        tar_of(place, at / f"{place.name}.tar", flat=True)
    return at


def as_web_dataset(folder, at):
    names = sorted(place.name for place in (folder / "train").iterdir())
    files = sorted((folder / "train").rglob("*.png"))
    for part in range(2):
        with tarfile.open(at / f"part-{part}.tar", "w") as tar:
            for i, file in list(enumerate(files))[8 * part : 8 * part + 8]:
                add(tar, f"{i:06d}.cls", str(names.index(file.parent.name)).encode())
                add(tar, f"{i:06d}.png", file.read_bytes())
                add(tar, f"{i:06d}.json", b"{}")
    return at


def as_dataset(folder, at):
    import datasets

    names = sorted(place.name for place in (folder / "train").iterdir())
    files = sorted((folder / "train").rglob("*.png"))
    columns = {"image": [str(f) for f in files], "label": [names.index(f.parent.name) for f in files]}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict(columns, features=kinds).save_to_disk(at / "set")
    return at / "set"


def as_splits(folder, at):
    import datasets

    one = datasets.load_from_disk(as_dataset(folder, at))
    datasets.DatasetDict({"test": one.select([0]), "train": one}).save_to_disk(at / "splits")
    return at / "splits"


@pytest.mark.parametrize(
    "form", [as_tar, as_tar_of_tars, as_folder_of_tars, as_web_dataset, as_dataset, as_splits], ids=lambda f: f.__name__
)
def test_every_source_gives_the_same_latents(form, folder, whole, codec, tmp_path, capfd):
    (tmp_path / "source").mkdir()
    index = run(form(folder, tmp_path / "source"), codec, tmp_path / "out")
    theirs, ours = tensors(tmp_path / "out"), tensors(whole)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    wanted = ("0", "1", "2") if form is as_web_dataset else read_index(whole).classes
    assert index.classes == wanted
    assert (index.mean, index.std) == (read_index(whole).mean, read_index(whole).std)


def test_folders_named_by_wordnet_have_imagenets_numbers(tmp_path, codec):
    made = write_synthetic(tmp_path / "made", 2, 1, 32)
    for place, wnid in zip(sorted(made.iterdir()), ("n02123045", "n01440764"), strict=True):
        place.rename(made / wnid)
    assert open_source(str(made)).labels == [0, 281]  # in the order of the names
    assert open_source(str(made)).class_names == wnids()
    own = open_source(str(made), "own")
    assert (own.labels, own.class_names) == ([0, 1], ("n01440764", "n02123045"))
    assert own.fingerprint != open_source(str(made)).fingerprint
    (made / "n02123045").rename(made / "Tabby Cat")
    assert open_source(str(made), "imagenet").labels == [281, 0]
    (made / "Tabby Cat").rename(made / "tabby cta")
    assert "tabby cat" in refused(lambda: open_source(str(made), "imagenet"))
    assert "did you mean 'own'" in refused(lambda: open_source(str(made), "owm"))


def test_only_the_training_part_counts_where_there_is_one(tmp_path):
    write_synthetic(tmp_path / "ILSVRC" / "train", 2, 2, 8)
    write_synthetic(tmp_path / "ILSVRC" / "val", 2, 1, 8)
    assert len(open_source(str(tmp_path))) == 4
    assert len(open_source(str(tmp_path / "ILSVRC" / "val"))) == 2
    Image.new("L", (9, 9)).save(tmp_path / "ILSVRC" / "train" / ".hidden.png")
    assert len(open_source(str(tmp_path))) == 4


def test_pictures_without_classes(tmp_path, codec):
    for i in range(3):
        Image.new("L", (33, 40 + i), 90 * i).save(tmp_path / f"{i}.png")
    run(tmp_path, codec, tmp_path / "out")
    train, _ = load(tmp_path / "out")
    assert (train.labels, train.num_classes) == (None, 0)
    assert "--set data.labels=false" in refused(lambda: load(tmp_path / "out", labels=True))
    (tmp_path / "cats").mkdir()
    (tmp_path / "2.png").rename(tmp_path / "cats" / "2.png")
    assert "0.png lies in no class folder" in refused(lambda: open_source(str(tmp_path)))


def test_transparency_lies_over_white_and_pictures_stand_upright(tmp_path):
    (tmp_path / "a").mkdir()
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    clear.save(tmp_path / "a" / "0.png")
    lying = Image.new("RGB", (32, 32))
    lying.paste((255, 255, 255), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise: white comes to lie on the right
    lying.save(tmp_path / "a" / "1.png", exif=exif)
    source = open_source(str(tmp_path))
    assert (picture(source, 0, SIZE) == 255).all()
    turned = picture(source, 1, SIZE)
    assert (turned[:, 20:] == 255).all()
    assert (turned[:, :12] == 0).all()


def test_a_limit_is_spread_over_the_set(folder, codec, tmp_path):
    index = run(folder, codec, tmp_path / "few", limit=6, flip=False)
    held = tensors(tmp_path / "few")
    assert index.examples == len(held["mean"]) == 6
    assert "mean_flipped" not in held
    assert sorted(set(held["label"].tolist())) == [0, 1, 2]
    assert plan(folder, codec, tmp_path, limit=100).chosen == list(range(15))


# -- interrupted, shared, damaged ------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_killed_at_any_write_and_resumed_is_never_stopped(folder, whole, codec, tmp_path, monkeypatch):
    replace, writes = Path.replace, []
    monkeypatch.setattr(Path, "replace", lambda self, to: (writes.append(to.name), replace(self, to))[1])
    run(folder, codec, tmp_path / "counted")
    assert len(writes) == 10  # the plan, a shard and an entry each, and the index
    for stop in range(10):
        out, count = tmp_path / f"stopped-{stop}", 0

        def killing(self, to, stop=stop):
            nonlocal count
            count += 1
            if count > stop:
                raise Killed
            return replace(self, to)

        monkeypatch.setattr(Path, "replace", killing)
        with pytest.raises(Killed):
            run(folder, codec, out)
        monkeypatch.setattr(Path, "replace", replace)
        assert not (out / INDEX).exists()
        assert "not finished" in refused(lambda out=out: load(out))
        said: list[str] = []
        assert run(folder, codec, out, say=said.append) is not None
        finished = max(0, stop - 1) // 2  # they are not made again
        assert sum("is made" in line for line in said) == 4 - finished
        assert content(out) == content(whole)


class Slow:
    """A codec that takes its time."""

    def __init__(self, codec):
        self._codec = codec

    def __getattr__(self, name):
        return getattr(self._codec, name)

    def encode(self, images):
        time.sleep(0.02)
        return self._codec.encode(images)


def test_a_process_killed_outright_loses_no_whole_shard(folder, whole, codec, tmp_path):
    out, fork = tmp_path / "out", multiprocessing.get_context("fork")
    for pause in (0.1, 0.25):  # in the midst of some shard: one takes .08 s
        child = fork.Process(target=run, args=(folder, Slow(codec), out))
        child.start()
        time.sleep(pause)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        for file in out.glob("latents-*.safetensors"):
            assert file.read_bytes() == (whole / file.name).read_bytes()
    (out / ".latents-00000.safetensors-ab.tmp").write_bytes(b"")
    for file in out.glob(".*.tmp"):  # of the killed: swept away where they are old enough to be nobody's
        os.utime(file, (0, 0))
    (out / ".latents-00001.safetensors-cd.tmp").write_bytes(b"")
    run(folder, codec, out)
    (out / ".latents-00001.safetensors-cd.tmp").unlink()
    assert content(out) == content(whole)


@pytest.mark.parametrize("total", [2, 3])
def test_workers_share_and_whoever_comes_last_writes_the_index(total, folder, whole, codec, tmp_path):
    made: set[int] = set()
    for i in range(total):
        index = run(folder, codec, tmp_path / "out", worker=Worker(i, total))
        assert (index is not None) == (i == total - 1)
        made |= set(range(i, 4, total))
        assert {int(file.stem[-5:]) for file in (tmp_path / "out").glob("*.safetensors")} == made
    assert content(tmp_path / "out") == content(whole)


def test_the_same_again_does_nothing_and_another_encoding_is_refused(folder, whole, codec, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    said: list[str] = []
    assert run(folder, codec, out, say=said.append) == read_index(whole)
    assert said == []
    assert content(out) == content(whole)
    assert "flip: True ≠ False" in refused(lambda: run(folder, codec, out, flip=False))
    assert "another autoencoder" in refused(lambda: run(folder, tiny_codec(1), out))
    assert "other pictures" in refused(lambda: run(folder / "train" / "class-0000-disc", codec, out))
    begun = tmp_path / "begun"
    run(folder, codec, begun, worker=Worker(0, 2))
    assert "size: 32 ≠ 16" in refused(lambda: run(folder, codec, begun, size=16))
    assert "holds other files" in refused(lambda: run(folder, codec, folder))
    assert "is a file" in refused(lambda: run(folder, codec, out / INDEX))


def test_damage_is_found_and_mended(folder, whole, codec, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    one, two = out / "latents-00001.safetensors", out / "latents-00002.safetensors"
    data = bytearray(one.read_bytes())
    data[-5] ^= 1
    one.write_bytes(data)
    assert verify(whole) == []
    assert verify(out) == [one.name]
    assert "its sha256 is not that of latents.json" in refused(lambda: load(out))
    said: list[str] = []
    run(folder, codec, out, say=said.append)
    assert said == []
    run(folder, codec, out, verify=True, say=said.append)
    assert f"{one.name} is damaged" in said[0]
    assert content(out) == content(whole)
    data = two.read_bytes()
    for other in (data[:-1], data + b" "):
        two.write_bytes(other)
        assert f"{two.name} has {len(other):,} bytes, not the {len(data):,}" in refused(lambda: load(out))
    two.unlink()
    assert "missing" in refused(lambda: load(out))
    run(folder, codec, out)
    assert content(out) == content(whole)
    two.write_bytes(b"\xff" * two.stat().st_size)
    assert "damaged" in refused(lambda: load(out))
    good = json.loads((whole / INDEX).read_text())
    cut = [{k: v for k, v in good.items() if k != key} for key in ("settings", "event_shape", "classes")]
    cut += [{**good, "shards": held} for held in ([], [3], [{"file": "latents-00000.safetensors"}])]
    for text in ("{", "[]", '{"shards": 3}', *map(json.dumps, cut)):
        (out / INDEX).write_text(text)
        assert "damaged: delete it, then run the mfm encode-latents command" in refused(lambda: load(out))
    (out / INDEX).unlink()  # as it says
    run(folder, codec, out)
    assert content(out) == content(whole)
    (out / INDEX).write_text(json.dumps({**good, "schema": 9}))
    assert "pip install --upgrade" in refused(lambda: load(out))
    assert "mfm encode-latents" in refused(lambda: load(tmp_path / "nowhere"))
    assert "mfm encode-latents" in refused(lambda: load(folder))
    assert "--set data.path=DIR" in refused(lambda: Latents().load())


@pytest.mark.parametrize("name", ["{there}/notes.safetensors", "../notes.safetensors", "notes.safetensors"])
@pytest.mark.parametrize("checked", [False, True])
def test_names_in_an_index_stay_inside_its_folder(name, checked, folder, whole, codec, tmp_path):
    """Whoever wrote the index: what it names is neither read nor written nor removed, but refused."""
    out, notes = tmp_path / "there" / "out", tmp_path / "there" / "notes.json"
    shutil.copytree(whole, out)
    notes.write_text("mine")
    document = json.loads((out / INDEX).read_text())
    document["shards"][1]["file"] = name.format(there=notes.parent)
    (out / INDEX).write_text(json.dumps(document))
    for act in (lambda: load(out), lambda: verify(out), lambda: run(folder, codec, out, verify=checked)):
        assert "damaged" in refused(act)
    assert notes.read_text() == "mine"
    assert sorted(file.name for file in out.iterdir()) == sorted(content(whole))


def flipped_bit(out: Path, document: dict) -> None:
    file = out / document["shards"][0]["file"]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def zeroed_tail(out: Path, document: dict) -> None:
    file = out / document["shards"][0]["file"]
    data = file.read_bytes()
    file.write_bytes(data[:-64] + bytes(64))


def swapped(out: Path, document: dict) -> None:
    one, two = (out / shard["file"] for shard in document["shards"][:2])
    one.rename(out / "aside")
    two.rename(one)
    (out / "aside").rename(two)


def listed_twice(out: Path, document: dict) -> None:
    document["shards"][1] = document["shards"][0]


def signed_again(label: int):
    """Whoever changes a label and writes the new hash into the index."""

    def damage(out: Path, document: dict) -> None:
        shard = document["shards"][0]
        held = load_file(out / shard["file"])
        held["label"][1] = label
        data = save(held)
        (out / shard["file"]).write_bytes(data)
        shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    return damage


DAMAGES = {"bit": flipped_bit, "tail": zeroed_tail, "swapped": swapped, "twice": listed_twice}
DAMAGES |= {f"label {label}": signed_again(label) for label in (-5, -1, 3, 999)}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_training_reads_no_damaged_shard(damage, whole, tmp_path):
    """Sizes are all right: hashes, names and classes tell."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    document = json.loads((out / INDEX).read_text())
    damage(out, document)
    (out / INDEX).write_text(json.dumps(document))
    message = refused(lambda: load(out, labels=True)[0].sample(3, stream(0)))
    assert "mfm encode-latents command that made it again" in message


def test_a_shard_is_hashed_once_in_a_process(whole, monkeypatch):
    load(whole)
    monkeypatch.setattr(hashlib, "file_digest", None)
    load(whole)[0].sample(3, stream(0))


def test_a_new_entry_never_vouches_for_a_damaged_shard(folder, whole, codec, tmp_path, monkeypatch):
    """Mended in other batches, so other bytes of the same size, and stopped between the shard and its entry."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    one = out / "latents-00001.safetensors"
    one.write_bytes(one.read_bytes()[:-1] + b"?")
    write = sharding.write_json

    def stopping(file, data):
        if file.stem == one.stem and one.stat().st_mtime_ns != damaged:
            raise KeyboardInterrupt
        write(file, data)

    damaged = one.stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(sharding, "write_json", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(folder, codec, out, verify=True, batch_size=2)
    run(folder, codec, out, batch_size=2)
    assert verify(out) == []


def test_what_killed_processes_left_half_written_is_removed_once_it_is_old(folder, codec, tmp_path):
    out = tmp_path / "out"
    run(folder, codec, out)
    old, new = out / ".latents-00000.safetensors-0a0a0a0a.tmp", out / ".latents-00000.safetensors-0b0b0b0b.tmp"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, time.time() - 2 * STALE_SECONDS))
    run(folder, codec, out)
    assert not old.exists()
    assert new.exists()  # of a process that may be at it


def test_other_pictures_of_the_same_names_are_another_source(tmp_path):
    """And a folder and its tar are the same one."""
    ours, theirs = (write_synthetic(tmp_path / str(seed), 2, 30, 16, seed=seed) for seed in (0, 1))
    again = write_synthetic(tmp_path / "again", 2, 30, 16, seed=0)
    assert open_source(str(ours)).fingerprint == open_source(str(again)).fingerprint
    assert open_source(str(ours)).fingerprint != open_source(str(theirs)).fingerprint
    with tarfile.open(tmp_path / "ours.tar", "w") as tar:
        for file in sorted(ours.rglob("*.png"), reverse=True):
            tar.add(file, file.relative_to(ours).as_posix())
    assert open_source(str(tmp_path / "ours.tar")).fingerprint == open_source(str(ours)).fingerprint


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    """Without it the classes would be numbered otherwise."""
    made = write_synthetic(tmp_path / "made", 3, 1, 16)
    closed, scandir = sorted(made.iterdir())[1], os.scandir

    def refusing(path):
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    message = refused(lambda: open_source(str(made)))
    assert str(closed) in message
    assert "Permission denied" in message


def test_a_picture_too_long_for_its_width_is_a_bad_one(tmp_path):
    """Its shorter side at 256 pixels, this one would take 256 × 1,280,000, a gigabyte; at 64 a sixteenth."""
    Image.new("RGB", (1, 5000)).save(tmp_path / "thin.png")
    source = open_source(str(tmp_path))
    assert "1 × 5000 is too long for its width" in refused(lambda: picture(source, 0, 256))
    assert picture(source, 0, 64).shape == (64, 64, 3)


def test_a_full_disk_leaves_what_was_finished(folder, whole, codec, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run(folder, codec, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))
    monkeypatch.setattr(os, "fsync", fsync)
    run(folder, codec, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


def test_a_picture_that_cannot_be_read_is_named_or_left_out(folder, whole, codec, tmp_path):
    shutil.copytree(folder, tmp_path / "made")
    files = sorted((tmp_path / "made").rglob("*.png"))
    files[1].write_bytes(files[1].read_bytes()[:60])
    Image.new("I;16", (40, 40)).save(files[6])
    message = refused(lambda: run(tmp_path / "made", codec, tmp_path / "out"))
    assert str(files[1]) in message
    assert "--skip-bad" in message
    index = run(tmp_path / "made", codec, tmp_path / "out", skip_bad=True)
    assert (index.examples, index.skipped) == (13, 2)
    assert [shard.skipped for shard in index.shards] == [(str(files[1]),), (str(files[6]),), (), ()]
    kept = [i for i in range(15) if i not in (1, 6)]
    ours, theirs = tensors(whole), tensors(tmp_path / "out")
    assert torch.equal(theirs["label"], ours["label"][kept])
    torch.testing.assert_close(theirs["mean"], ours["mean"][kept], rtol=0, atol=STORED)  # in other batches
    assert torch.equal(theirs["mean"][6:], ours["mean"][8:])  # shards beyond the second are as they were
    assert len(load(tmp_path / "out")[0]) == 12


def test_nothing_but_bad_pictures_is_no_set(codec, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "text.png").write_text("no picture")
    assert "no picture of a known format" in refused(lambda: run(tmp_path / "made", codec, tmp_path / "out"))
    assert "none of the pictures" in refused(lambda: run(tmp_path / "made", codec, tmp_path / "out", skip_bad=True))
    assert "no latents.json" in refused(lambda: load(tmp_path / "out"))


def test_latents_that_are_no_numbers_are_refused(folder, codec, tmp_path):
    class Overflowing(Slow):
        def encode(self, images):
            mean, std = self._codec.encode(images)
            return mean * 1e6, std

    message = refused(lambda: run(folder, Overflowing(codec), tmp_path / "out"))
    assert "--dtype float32" in message
    assert str(sorted(folder.rglob("*.png"))[0]) in message


def test_sources_that_cannot_be_used(folder, tmp_path):
    assert "there is no" in refused(lambda: open_source(str(tmp_path / "nowhere")))
    assert "no pictures" in refused(lambda: open_source(str(tmp_path)))
    assert "hf:owner/name" in refused(lambda: open_source("hf:name"))
    tar = as_tar(folder, tmp_path)
    data = tar.read_bytes()
    for packed, command in ((b"\x1f\x8b", "gunzip"), (b"\x28\xb5\x2f\xfd", "unzstd")):
        tar.write_bytes(packed + data)
        assert f"unpack it with {command}" in refused(lambda: open_source(str(tar)))
    tar.write_bytes(data[: len(data) // 2])
    assert "not a whole tar" in refused(lambda: open_source(str(tar)))
    tar.write_bytes(b"no tar at all" * 100)
    assert "not a whole tar" in refused(lambda: open_source(str(tar)))
    with tarfile.open(tar, "w") as opened:
        add(opened, "1.cls", b"0")
        add(opened, "1.png", b"")
        add(opened, "2.png", b"")
    assert "2.png has no 2.cls" in refused(lambda: open_source(str(tar)))
    with tarfile.open(tar, "w") as opened:
        add(opened, "1.cls", b"123456789012")
        add(opened, "1.png", b"")
    assert "no number of a class" in refused(lambda: open_source(str(tar)))


def test_datasets_that_cannot_be_used(tmp_path):
    import datasets

    def saved(**columns):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "set")
        return str(tmp_path / "set")

    assert "column of type Image" in refused(lambda: open_source(saved(text=["a"])))
    images = [Image.new("RGB", (8, 8))] * 2
    assert "holds -1" in refused(lambda: open_source(saved(image=images, label=[0, -1])))
    named = open_source(saved(image=images, label=["b", "a"]))
    assert (named.labels, named.class_names) == ([1, 0], ("a", "b"))
    assert open_source(saved(image=images, other=[0, 1])).labels == [-1, -1]
    (tmp_path / "set" / "state.json").write_text("{")
    assert "cannot be opened" in refused(lambda: open_source(str(tmp_path / "set")))


# -- drawing ---------------------------------------------------------------------------------------------------------


def test_draws_resample_the_stored_posterior(whole):
    """Of one picture, n draws: each side's share, and its mean and spread, within bounds in standard errors."""
    train, _ = load(whole, limit=1, hold_out=1)
    place = int(train.index)
    held = {name: x[place].double() for name, x in tensors(whole).items() if name != "label"}
    n = 20_000
    x = train.sample(n, stream(0, "draws")).double()
    assert x.shape == (n, 4, 4, 4)
    # the sides' means lie many standard deviations apart in all: each draw tells which one it is of
    gap = (held["mean"] - held["mean_flipped"]) / held["std"].square()
    middle = (held["mean"] + held["mean_flipped"]) / 2
    assert float(((held["mean"] - held["mean_flipped"]) / held["std"]).square().sum().sqrt()) > 8
    plain = ((x - middle) * gap).sum((1, 2, 3)) > 0
    assert abs(float(plain.double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(n)
    for side, (mean, std) in ((x[plain], ("mean", "std")), (x[~plain], ("mean_flipped", "std_flipped"))):
        z = (side.mean(0) - held[mean]) / held[std] * math.sqrt(len(side))
        assert float(z.abs().max()) < 4.5  # the largest of 64 normals: P < 5e-4
        ratio = side.var(0) / held[std].square()
        assert float((ratio - 1).abs().max()) < 4.5 * math.sqrt(2 / len(side))
    # coordinates are drawn independently: correlations of neighbours are 0 within 4.5/√n
    noise = ((x[plain] - held["mean"]) / held["std"]).flatten(1)
    assert abs(float((noise[:, 1:] * noise[:, :-1]).mean())) < 4.5 / math.sqrt(len(noise))


def test_draws_are_a_function_of_the_generator_and_labels_go_with_them(whole):
    train, _ = load(whole, labels=True)
    first = train.sample(64, stream(0, "train", 3))
    assert torch.equal(load(whole)[0].sample(64, stream(0, "train", 3)), first)
    assert not torch.equal(train.sample(64, stream(0, "train", 4)), first)
    x, labels = train.sample_labelled(64, stream(0, "train", 3))
    assert torch.equal(x, first)
    held = tensors(whole)
    both = torch.stack([held["mean"], held["mean_flipped"]]).float()
    spread = torch.stack([held["std"], held["std_flipped"]]).float()
    distance = ((x[:, None, None] - both) / spread).square().flatten(3).mean(3)  # 1 for the picture that was drawn
    nearest = distance.amin(1).argmin(1)
    assert torch.equal(held["label"][nearest], labels)
    assert set(nearest.tolist()) == set(train.index.tolist())  # 64 draws of 14


def test_the_split_follows_the_rule_of_all_sets(whole):
    train, held_out = load(whole)
    order = torch.randperm(15, generator=stream(0, "data-split"))
    assert (train.index.tolist(), held_out.index.tolist()) == (order[1:].tolist(), order[:1].tolist())
    few, held_few = load(whole, limit=4, hold_out=3)
    assert (few.index.tolist(), held_few.index.tolist()) == (order[3:7].tolist(), order[:3].tolist())
    assert "at most 14" in refused(lambda: load(whole, hold_out=15))
    held = tensors(whole)
    assert torch.equal(train.tensor(), held["mean"][order[1:]].float())
    assert torch.equal(train.tensor(torch.tensor([2, 0])), held["mean"][order[[3, 1]]].float())
    assert torch.equal(train.tensor(slice(0, 2)), held["mean"][order[1:3]].float())
    assert torch.equal(train.labels, held["label"][order[1:]])
    assert (train.event_shape, train.num_classes, len(train)) == ((4, 4, 4), 3, 14)


def test_one_line_for_the_user(whole):
    line = Latents(path=str(whole)).describe()
    for part in ("latents from", "14 images to train on and 1 held out", "4×4×4", "3 classes"):
        assert part in line
    for settings in ({"size": 32}, {"channels": 3}):
        message = refused(lambda s=settings: built(DataSource, {"name": "latents", "path": "x", **s}))
        assert "unknown option of latents" in message


def test_many_shards_are_drawn_from_quickly(tmp_path):
    """512 of 16,384 latents in 64 shards: about 20 ms of a core; the bound allows for a slower one."""
    n, shape = 256, (4, 32, 32)
    law = {"mean": torch.zeros(n, *shape).half(), "std": torch.ones(n, *shape).half(), "label": torch.full((n,), -1)}
    law |= {"sum": torch.zeros(shape).double(), "square": torch.full(shape, float(n)).double()}
    file = tmp_path / "latents-00000.safetensors"
    file.write_bytes(save(law))
    names = [f"latents-{k:05d}.safetensors" for k in range(64)]
    for name in names[1:]:
        os.link(file, tmp_path / name)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    shards = tuple(LatentShard(name, n, file.stat().st_size, digest) for name in names)
    LatentIndex("x", "x", Encoding("", "", 1.0, "float32"), shape, 64 * n, (), 0, 0.0, 1.0, shards).write(tmp_path)
    train, _ = load(tmp_path)
    seconds = []
    for step in range(5):
        began = time.process_time()  # a busy neighbour is no fault of ours
        x = train.sample(512, stream(0, "train", step))
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.05
    assert abs(float(x.std()) - 1) < 5 / math.sqrt(2 * x.numel())  # its standard error


# -- the synthetic set -----------------------------------------------------------------------------------------------


def test_the_synthetic_set_shows_its_classes(tmp_path):
    root = write_synthetic(tmp_path / "a", 4, 12, 32)
    assert content_of(root) == content_of(write_synthetic(tmp_path / "b", 4, 12, 32))
    assert content_of(root) != content_of(write_synthetic(tmp_path / "c", 4, 12, 32, seed=1))
    source = open_source(str(root))
    x = torch.stack([torch.from_numpy(picture(source, i, 32)) for i in range(len(source))]).double()
    labels = torch.tensor(source.labels)
    # the mean colour of what is no grey, against the classes' mean colours by leave-one-out
    chroma = (x - x.mean(3, keepdim=True)).flatten(1, 2).mean(1)
    near = torch.cdist(chroma, chroma).fill_diagonal_(torch.inf).argmin(1)
    assert float((labels[near] == labels).double().mean()) > 0.9  # by chance .25
    assert len(list(write_synthetic(tmp_path / "d", 2, 1, 16, kind="jpeg").rglob("*.jpeg"))) == 2
    assert "png or jpeg" in refused(lambda: write_synthetic(tmp_path / "e", kind="bmp"))
    assert "classes" in refused(lambda: write_synthetic(tmp_path / "e", classes=0))


def content_of(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(root.rglob("*.png"))}
