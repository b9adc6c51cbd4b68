"""Checkpoints: complete and verified, or refused. Faults are injected at every single system call."""

import builtins
import errno
import json
import os
import pickle
import random
import shutil
import struct
import time
import warnings
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metaflowmaps as mfm
from metaflowmaps import _files
from metaflowmaps.checkpoint import (
    CheckpointError,
    CheckpointStore,
    flatten_state,
    model_config,
    read_checkpoint,
    recover,
    resolve_checkpoint,
    save_model,
    unflatten_state,
    write_checkpoint,
    writing,
)
from metaflowmaps.checkpoint import manifest as manifests
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks import NetworkConfig, make_network
from metaflowmaps.networks.mlp import MLP, MLPConfig
from metaflowmaps.work.choices import build

FILES = ["config.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors", "position.json"]


def make_model(seed=0, dim=2, data_mean=0.0, data_std=1.3):
    network = MLPConfig(width=8, depth=2).network((dim,))
    model = mfm.MetaFlowMap(network, mfm.TrigonometricPath(), data_mean=data_mean, data_std=data_std)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


STATE, CONFIG = make_model().state_dict(), model_config(make_model())


def contents(value):
    """What a training run would write; the number tells one checkpoint from another."""
    tensors = {
        "model.safetensors": {k: v + value for k, v in STATE.items()},
        "ema.safetensors": {k: v - value for k, v in STATE.items()},
        "optimizer.safetensors": {"0": torch.full((3,), float(value))},
    }
    documents = {"config.json": {**CONFIG, "training": {"steps": value}}, "position.json": {"step": value}}
    return tensors, documents


def value_of(path):
    return read_checkpoint(path).document("position.json")["step"]


def hidden(parent):
    return sorted(entry.name for entry in parent.iterdir() if entry.name.startswith("."))


def rewrite_manifest(path, change=lambda manifest: None):
    """Make the manifest agree with the files, as somebody who edits a checkpoint could."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    for name in list(manifest["files"]):
        data = (path / name).read_bytes()
        manifest["files"][name] = {"sha256": sha256(data).hexdigest(), "bytes": len(data)}
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def attempt(action):
    try:
        action()
    except CheckpointError as error:
        return error
    return None


def refusal(action):
    with pytest.raises(CheckpointError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    assert isinstance(caught.value.path, Path)
    return line


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved"
    write_checkpoint(path, *contents(1))
    return path


# -- writing and reading -------------------------------------------------------------------------------------


def test_tensors_and_documents_come_back_bit_for_bit(tmp_path):
    base = torch.arange(12.0)
    tensors = {
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "bf16": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "f64": torch.tensor(0.1, dtype=torch.float64),
        "int": torch.tensor([2**62, -1]),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "tied": base,
        "tied too": base,
        "part": base[3:7],
        "strided": base.view(3, 4).t(),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "leaf": torch.nn.Parameter(torch.ones(2)),
    }
    document = {"a": [1, 0.1, None, True, "é\ud800"], "nested": {"inf": float("inf")}}
    write_checkpoint(tmp_path / "c", {"model.safetensors": tensors}, {"config.json": document})
    checkpoint = read_checkpoint(tmp_path / "c")
    loaded = checkpoint.tensors("model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor.detach().resolve_conj()), name
    assert checkpoint.config == document
    assert checkpoint.has("model.safetensors")
    assert not checkpoint.has("ema.safetensors")
    assert "holds model.safetensors" in refusal(lambda: checkpoint.tensors("ema.safetensors"))


def test_the_manifest_is_what_the_interface_says(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert sorted(manifest["files"]) == sorted(FILES)
    for name, entry in manifest["files"].items():
        data = (saved / name).read_bytes()
        assert entry == {"sha256": sha256(data).hexdigest(), "bytes": len(data)}


def test_what_is_parsed_is_what_was_hashed(saved, monkeypatch):
    # every file turns to garbage as soon as it has been read: only a second read would see it
    read, reads = manifests.read_regular, []

    def read_then_spoil(file, *most):
        data = read(file, *most)
        reads.append(file.name)
        file.write_bytes(b"spoiled")
        return data

    monkeypatch.setattr(manifests, "read_regular", read_then_spoil)
    checkpoint = read_checkpoint(saved)
    assert sorted(reads) == sorted([*FILES, "manifest.json"])
    expected = contents(1)[0]["model.safetensors"]
    assert all(same(v, expected[k]) for k, v in checkpoint.tensors("model.safetensors").items())


def test_everything_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    write_checkpoint(tmp_path / "c", *contents(1))
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    inodes = {name: (tmp_path / "c" / name).stat().st_ino for name in [*FILES, "manifest.json"]}
    assert set(before) == {*inodes.values(), (tmp_path / "c").stat().st_ino}
    assert before[-2:] == [inodes["manifest.json"], (tmp_path / "c").stat().st_ino]
    assert after == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("name", ["../x.json", "x.txt", "manifest.json", "sub/x.json"])
def test_names_that_are_no_checkpoint_files_are_refused(tmp_path, name):
    tensors, documents = contents(1)
    with pytest.raises(InputError, match="plain"):
        write_checkpoint(tmp_path / "c", tensors, {**documents, name: 1})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    line = refusal(lambda: write_checkpoint(tmp_path / "home", *contents(1)))
    assert "thesis.tex" in line
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    assert hidden(tmp_path) == []
    (tmp_path / "file").write_text("text")
    assert "is a file" in refusal(lambda: write_checkpoint(tmp_path / "file", *contents(1)))
    refusal(lambda: write_checkpoint(tmp_path / "file" / "below", *contents(1)))
    assert (tmp_path / "file").read_text() == "text"


# -- faults --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@contextmanager
def faults(action, at, onwards=False, deleting=False):
    """Act in place of the at-th mkdir, write, fsync or rename (and of all later ones); yields their count."""
    count = [0]

    def due():
        count[0] += 1
        return count[0] - 1 >= at if onwards else count[0] - 1 == at

    def faulty(function):
        def call(*args, **kwargs):
            if due():
                action()
            return function(*args, **kwargs)

        return call

    class File:
        def __init__(self, handle):
            self.handle = handle

        def write(self, data):
            if due():  # half of it arrives
                self.handle.write(data[: len(data) // 2])
                self.handle.flush()
                action()
            return self.handle.write(data)

        def __getattr__(self, name):
            return getattr(self.handle, name)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.handle.close()

    names = ["mkdir", "fsync", "rename"] + (["unlink", "rmdir"] if deleting else [])
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, faulty(getattr(os, name)))
        patch.setattr(_files, "open", lambda *a: File(builtins.open(*a)), raising=False)  # noqa: SIM115
        yield count


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt():
    raise KeyboardInterrupt


def die():
    os._exit(9)


def operations(tmp_path, deleting=False):
    """How many operations there are to fail in replacing a checkpoint."""
    write_checkpoint(tmp_path / "rehearsal" / "c", *contents(1))
    with faults(no_space, at=10**6, deleting=deleting) as count:
        write_checkpoint(tmp_path / "rehearsal" / "c", *contents(2))
    assert count[0] >= 6 * 2 + 6  # six files written and flushed, a directory made, three renames, two syncs
    return count[0]


@pytest.mark.parametrize("onwards", [False, True], ids=["once", "from then on"])
def test_a_full_disk_harms_nothing(tmp_path, onwards):
    raised = 0
    for at in range(operations(tmp_path)):
        parent = tmp_path / str(at)
        write_checkpoint(parent / "c", *contents(1))
        with faults(no_space, at, onwards):
            error = attempt(lambda parent=parent: write_checkpoint(parent / "c", *contents(2)))
        if error:
            raised += 1
            line = str(error)
            assert all(words in line for words in (str(parent / "c"), "no space left", "free some space"))
            assert "\n" not in line
        # where later renames fail too, the new one may be unable to step back: complete all the same
        allowed = (2,) if error is None else (1, 2) if onwards else (1,)
        assert value_of(parent / "c") in allowed
        assert onwards or (parent / "c").is_dir()  # under its own name
        assert not [name for name in hidden(parent) if name.startswith(".tmp-")]
        write_checkpoint(parent / "c", *contents(3))
        assert value_of(parent / "c") == 3
        assert not [name for name in hidden(parent) if not name.startswith(".del-")]
    assert raised >= 15


def test_a_full_disk_leaves_nothing_of_a_first_checkpoint(tmp_path):
    # not the first, which makes a parent that is there, nor the two that move a predecessor
    for at in range(1, operations(tmp_path) - 2):
        parent = tmp_path / str(at)
        parent.mkdir()
        with faults(no_space, at), pytest.raises(CheckpointError):
            write_checkpoint(parent / "c", *contents(1))
        assert list(parent.iterdir()) == []


def test_an_interrupt_leaves_no_temporary_directory(tmp_path):
    for at in range(operations(tmp_path)):
        parent = tmp_path / str(at)
        write_checkpoint(parent / "c", *contents(1))
        with faults(interrupt, at), pytest.raises(KeyboardInterrupt):
            write_checkpoint(parent / "c", *contents(2))
        assert (parent / "c").is_dir()
        assert value_of(parent / "c") in (1, 2)
        assert not [name for name in hidden(parent) if name.startswith(".tmp-")]


def crash(action, at):
    """Run in a child that dies, with no clean-up at all, at its at-th operation; whether it did."""
    child = os.fork()
    if child == 0:
        try:
            with faults(die, at, deleting=True):
                action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_crash_anywhere_leaves_the_old_or_the_new(tmp_path):
    between, seen = 0, set()
    for at in range(operations(tmp_path, deleting=True)):
        parent = tmp_path / str(at)
        write_checkpoint(parent / "c", *contents(1))
        assert crash(lambda parent=parent: write_checkpoint(parent / "c", *contents(2)), at)
        between += not (parent / "c").exists()
        value = value_of(parent / "c")  # before any recovery
        recover(parent)
        assert hidden(parent) == []
        assert value_of(parent / "c") == value
        seen.add(value)
    assert between == 1  # the crash between the two renames did happen
    assert seen == {1, 2}


def test_writing_recovers_its_own_name(tmp_path):
    for name, step in (("a", 1), ("b", 2)):
        write_checkpoint(tmp_path / name, *contents(step))
    (tmp_path / "a").rename(tmp_path / ".old-a")  # stopped between the renames
    shutil.copytree(tmp_path / "b", tmp_path / ".old-b")  # stopped before the deletion
    with faults(no_space, 5), pytest.raises(CheckpointError):
        write_checkpoint(tmp_path / "a", *contents(3))
    assert value_of(tmp_path / "a") == 1
    write_checkpoint(tmp_path / "b", *contents(4))
    assert value_of(tmp_path / "b") == 4
    assert hidden(tmp_path) == []


def test_recover_touches_nothing_else(tmp_path):
    write_checkpoint(tmp_path / "c", *contents(1))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".tmp-c-0").mkdir()
    (tmp_path / ".tmp-c-0" / "model.safetensors").write_bytes(b"half")
    recover(tmp_path)
    recover(tmp_path / "absent")
    assert sorted(e.name for e in tmp_path.iterdir()) == [".hidden", "c"]


# -- corruption ----------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling this leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_every_damage_is_refused(saved, name):
    file, original = saved / name, (saved / name).read_bytes()
    trace = saved.parent / "unpickled"
    rng = random.Random(name)
    damaged = [original[: len(original) // 2], b"", original + b"\n", pickle.dumps(Bomb(trace))]
    bits = rng.sample(range(8 * len(original)), 200 if name == "manifest.json" else 60)
    for bit in bits:
        flipped = bytearray(original)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    silent = []
    for data in damaged[3:] if name == "manifest.json" else damaged:  # a manifest may end in white space
        file.write_bytes(data)
        error = attempt(lambda: read_checkpoint(saved))
        if error is None:
            silent.append(data)
            continue
        # a manifest that lies about a file shows in that file
        assert (name if name == "manifest.json" else str(file)) in str(error)
        assert "\n" not in str(error)
        assert ": " in error.problem  # the fix
    assert silent == []
    file.unlink()
    assert str(file) in refusal(lambda: read_checkpoint(saved))
    assert not trace.exists()
    file.write_bytes(original)
    assert value_of(saved) == 1


def test_a_truncated_manifest_is_refused(saved):
    file, original = saved / "manifest.json", (saved / "manifest.json").read_bytes()
    for end in range(0, len(original.rstrip()), 11):
        file.write_bytes(original[:end])
        assert str(file) in refusal(lambda: read_checkpoint(saved))


@pytest.mark.parametrize("version", [0, 2, "1", True, 1.0, None])
def test_another_format_is_refused(saved, version):
    rewrite_manifest(saved, lambda m: m.update(format=version))
    line = refusal(lambda: read_checkpoint(saved))
    assert "manifest.json" in line
    if type(version) is int:
        assert "this package reads format 1" in line
        assert "--upgrade" in line


def test_an_edited_manifest_is_refused(saved):
    def edits():
        yield lambda m: m["files"]["model.safetensors"].update(sha256="0" * 64), "model.safetensors"
        yield lambda m: m["files"]["model.safetensors"].update(bytes=1), "model.safetensors"
        yield lambda m: m["files"].pop("model.safetensors"), "model.safetensors"
        yield lambda m: m["files"].pop("config.json"), "config.json"
        yield lambda m: m["files"].update({"../x.json": m["files"]["config.json"]}), "../x.json"
        yield lambda m: m["files"].update({"x.pt": m["files"]["config.json"]}), "x.pt"
        yield lambda m: m["files"].update({"x.json": m["files"]["config.json"]}), "x.json"
        yield lambda m: m["files"]["config.json"].update(extra=1), "config.json"
        yield lambda m: m.update(files=[]), "manifest.json"

    (saved.parent / "x.json").write_bytes((saved / "config.json").read_bytes())
    (saved / "x.pt").write_bytes((saved / "config.json").read_bytes())
    for edit, name in edits():
        rewrite_manifest(saved, edit)
        assert name in refusal(lambda: read_checkpoint(saved))
        shutil.rmtree(saved)
        write_checkpoint(saved, *contents(1))
        (saved / "x.pt").write_bytes((saved / "config.json").read_bytes())


def test_parts_of_several_ranks_of_version_0_1_are_ignored(saved):
    """Beside them their averaged weights lay in one piece, and load."""
    manifest = json.loads((saved / "manifest.json").read_text())
    for name, part in (("model.safetensors", "__0_0.distcp"), ("optimizer.safetensors", ".metadata")):
        (saved / name).rename(saved / part)
        (saved / part).write_bytes(pickle.dumps(Bomb(saved.parent / "unpickled")))
        manifest["files"][part] = manifest["files"].pop(name)
    (saved / "manifest.json").write_text(json.dumps(manifest))
    rewrite_manifest(saved)
    assert same(MetaFlowMap.from_pretrained(saved).state_dict()["data_mean"], STATE["data_mean"] - 1)
    assert "holds ema.safetensors" in refusal(lambda: MetaFlowMap.from_pretrained(saved, weights="raw"))
    assert not (saved.parent / "unpickled").exists()
    write_checkpoint(saved, *contents(2))
    assert value_of(saved) == 2


def test_files_that_are_not_listed_are_ignored(saved):
    (saved / "README.md").write_text("hello")
    assert value_of(saved) == 1


@pytest.mark.parametrize("name", FILES)
def test_pickles_with_a_matching_manifest_are_not_unpickled(saved, name):
    (saved / name).write_bytes(pickle.dumps(Bomb(saved.parent / "unpickled")))
    rewrite_manifest(saved)
    assert str(saved / name) in refusal(lambda: read_checkpoint(saved))
    assert not (saved.parent / "unpickled").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".bin", ".ckpt"])
def test_pickled_files_are_sent_to_convert(tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "unpickled")))
    for reader in (read_checkpoint, resolve_checkpoint, MetaFlowMap.from_pretrained):
        line = refusal(lambda reader=reader: reader(file))
        assert str(file) in line
        assert "pickled files are never read: save the weights as safetensors" in line
    assert not (tmp_path / "unpickled").exists()


def test_what_is_not_a_checkpoint_says_what_is(saved, tmp_path):
    assert "give the one that holds" in refusal(lambda: read_checkpoint(saved / "model.safetensors"))
    assert "no such directory" in refusal(lambda: read_checkpoint(tmp_path / "absent"))
    assert "manifest.json: missing" in refusal(lambda: read_checkpoint(tmp_path))
    line = refusal(lambda: resolve_checkpoint(tmp_path / "absent"))
    assert all(word in line for word in ("no such file or directory", "manifest.json", "checkpoints/", "hub"))
    assert "cannot be read" in refusal(lambda: read_checkpoint(tmp_path / ("x" * 300)))


def test_the_error_survives_a_trip_between_processes():
    error = pickle.loads(pickle.dumps(CheckpointError("a/b", "is\nodd")))
    assert (str(error), error.path) == ("a/b: is odd", Path("a/b"))
    assert isinstance(error, InputError)


# -- the store -----------------------------------------------------------------------------------------------


def save_step(store, step, score=None):
    tensors, documents = contents(step)
    store.save(step, {"model.safetensors": tensors["model.safetensors"]}, documents, score=score)


def test_the_store_keeps_the_newest_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    kept = []
    for step, score in enumerate([5.0, 3.0, 4.0, None, 3.0, float("nan"), 9.0, 2.0, 8, 8], start=1):
        save_step(store, step, score)
        kept.append(store.steps())
    # step 2 wins the tie with step 5, and gives way to step 8
    best_2 = [[2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7]]
    assert kept == [[1], [1, 2], *best_2, [7, 8], [8, 9], [8, 9, 10]]
    assert read_checkpoint(store.path(8)).document("position.json") == {"step": 8, "score": 2.0}
    assert store.path(8).name == "step-00000008"
    assert hidden(store.root) == []


def test_the_store_may_keep_the_newest_only(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=False)
    for step in (1, 2, 3):
        save_step(store, step, float(step))
    assert store.steps() == [3]
    with pytest.raises(InputError, match="keep_last"):
        CheckpointStore(tmp_path, keep_last=0)
    with pytest.raises(InputError, match="step"):
        save_step(store, -1)


def test_a_resumed_run_prunes_like_one_never_stopped(tmp_path):
    scores = {1: 2.0, 2: 1.0, 3: 5.0, 4: 4.0, 5: 3.0}

    def run(root, first, last):
        store = CheckpointStore(root, keep_last=2)
        store.clean()
        store.prune(first - 1)
        for step in range(first, last + 1):
            save_step(store, step, scores[step])

    run(tmp_path / "straight", 1, 5)
    expected = sorted(e.name for e in (tmp_path / "straight").iterdir())
    assert expected == ["step-00000002", "step-00000004", "step-00000005"]
    run(tmp_path / "start", 1, 4)
    crashed, at = True, 0
    while crashed:
        root = tmp_path / f"crash-{at}"
        shutil.copytree(tmp_path / "start", root)
        crashed = crash(lambda root=root: run(root, 5, 5), at)
        store = CheckpointStore(root)
        newest, skipped = store.latest_valid()
        assert skipped == []
        assert all(value_of(store.path(step)) == step for step in store.steps())  # none half deleted
        run(root, newest.document("position.json")["step"] + 1, 5)
        assert sorted(e.name for e in root.iterdir()) == expected
        at += 1
    assert at > 18


def test_steps_that_a_resume_skipped_do_not_displace_valid_ones(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 7, 8, 9):
        save_step(CheckpointStore(tmp_path, keep_last=9), step)
    for step in (7, 8, 9):
        (store.path(step) / "model.safetensors").write_bytes(b"")
    save_step(store, 2)
    save_step(store, 3)
    newest, skipped = store.latest_valid()
    assert newest.document("position.json")["step"] == 3
    assert len(skipped) == 3
    assert store.steps() == [2, 3, 7, 8, 9]


def test_latest_valid_says_what_it_skipped(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.latest_valid() == (None, [])
    for step in (1, 2, 3):
        save_step(store, step)
    data = bytearray((store.path(3) / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (store.path(3) / "model.safetensors").write_bytes(data)
    (store.path(2) / "manifest.json").unlink()
    newest, skipped = store.latest_valid()
    assert newest.document("position.json")["step"] == 1
    assert [str(store.path(3) / "model.safetensors") in skipped[0], "sha256" in skipped[0]] == [True, True]
    assert str(store.path(2) / "manifest.json") in skipped[1]
    shutil.rmtree(store.path(1))
    newest, skipped = store.latest_valid()
    assert newest is None
    assert len(skipped) == 2


def test_the_store_ignores_and_cleans_what_is_not_a_step(tmp_path):
    store = CheckpointStore(tmp_path)
    save_step(store, 1)
    for name in ("step-x", "other", ".tmp-step-00000002-0", ".del-step-00000000-0"):
        (tmp_path / name).mkdir()
    store.path(1).rename(tmp_path / ".old-step-00000001")
    assert store.steps() == [1]
    assert store.latest_valid()[0].document("position.json")["step"] == 1
    store.clean()
    assert sorted(e.name for e in tmp_path.iterdir()) == ["other", "step-00000001", "step-x"]


# -- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.5, torch.tensor([1.0, -2.0])], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_comes_back(tmp_path, mean, dtype):
    model = make_model(data_mean=mean).to(dtype)
    save_model(model, tmp_path / "m")
    before = torch.random.get_rng_state()
    loaded = MetaFlowMap.from_pretrained(tmp_path / "m")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not loaded.training
    assert loaded.dtype == dtype
    assert model_config(loaded) == model_config(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(same(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    draws = [m.draw(0.3, x, 2, generator=torch.Generator().manual_seed(2)) for m in (model, loaded)]
    assert torch.equal(*draws)
    assert same(mfm.MetaFlowMap.from_pretrained(tmp_path / "m").data_mean, model.data_mean)


TIED = """
from metaflowmaps.networks import MLP, MLPConfig


class TiedConfig(MLPConfig):
    name = "tied"

    def build(self, event_shape):
        network = MLP(self, event_shape)
        network.again = network.output
        return network
"""


def test_tied_weights_stay_tied(tmp_path):
    (tmp_path / "tied.py").write_text(TIED)
    config = build(NetworkConfig, f"{tmp_path / 'tied.py'}:TiedConfig", {"width": 4, "depth": 1})
    model = mfm.MetaFlowMap(config.network((2,)), mfm.LinearPath()).double()
    save_model(model, tmp_path / "m")
    loaded = MetaFlowMap.from_pretrained(tmp_path / "m")
    assert loaded.network.again.weight is loaded.network.output.weight
    assert loaded.dtype == torch.float64


def test_the_average_is_preferred(saved):
    for weights, sign in (("ema", -1), ("raw", 1)):
        loaded = MetaFlowMap.from_pretrained(saved, weights=weights).state_dict()
        assert all(same(loaded[k], STATE[k] + sign) for k in STATE)
    with pytest.raises(InputError, match="allowed are ema, raw"):
        MetaFlowMap.from_pretrained(saved, weights="best")
    save_model(make_model(), saved.parent / "plain")
    assert same(MetaFlowMap.from_pretrained(saved.parent / "plain").state_dict()["data_mean"], STATE["data_mean"])


def edit_config(saved, **changes):
    config = json.loads((saved / "config.json").read_text())
    config.update(changes)
    (saved / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    rewrite_manifest(saved)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "classifier"}, "'meta-flow-map'"),
        ({"format": 2}, "this package reads format 1"),
        ({"path": "liner"}, "did you mean 'linear'"),
        ({"path": [1]}, "does not describe a model"),
        ({"parameterization": "gausian"}, "did you mean 'gaussian'"),
        ({"data_std": -1.0}, "data_std"),
        ({"data_std": "wide"}, "data_std must be a positive number"),
        ({"network": {"name": "mpl"}}, "did you mean 'mlp'"),
        ({"network": {"name": "mlp", "dim": 2, "heads": 3}}, "heads"),
        ({"network": {"name": "mlp", "dim": "2"}}, "event_shape must list whole numbers"),
        ({"network": {"name": "mlp", "dim": 2, "activation": "step"}}, "step"),
        ({"network": 7}, "does not describe a model"),
        ({"data_std": ...}, "'data_std'"),
    ],
)
def test_a_config_that_is_no_model_is_refused(saved, changes, says):
    edit_config(saved, **changes)
    line = refusal(lambda: MetaFlowMap.from_pretrained(saved))
    assert str(saved / "config.json") in line
    assert says in line


@pytest.mark.parametrize("name", ["evil.py:Net", "./evil.py:Net", "../evil.py:Net"])
def test_a_config_names_no_code_of_the_folder_one_is_in(saved, name, tmp_path, monkeypatch):
    """Of a checkpoint that was unpacked, its author's file may lie there; those that we write have absolute paths."""
    monkeypatch.chdir(saved)
    for folder in (saved, saved.parent):
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((saved / "config.json").read_text())
    for changes in ({"network": {**config["network"], "name": name}}, {"training": {"data": [{"name": name}]}}):
        edit_config(saved, **changes)
        assert "absolute path" in refusal(lambda: MetaFlowMap.from_pretrained(saved))
    assert not (tmp_path / "ran").exists()


def test_what_killed_writers_left_goes_with_the_next_write(tmp_path):
    made = [tmp_path / name for name in (".tmp-m-0a0a0a0a", ".del-m-0a0a0a0a", ".tmp-m-0b0b0b0b", ".tmp-mine-0a0a0a0a")]
    for folder in made:
        folder.mkdir()
    for old in (made[0], made[1], made[3]):
        os.utime(old, (0, time.time() - 2 * _files.STALE_SECONDS))
    make_model().save_pretrained(tmp_path / "m")
    assert [folder.exists() for folder in made] == [False, False, True, True]  # who may be at it, and another's


HUGE = {
    "deep": {"depth": 1000},  # as many as a configuration may ask for
    "deeper": {"depth": 10**6},
    "wide": {"width": 2**16},
    "wider": {"width": 10**12},
    "many classes": {"num_classes": 10**6, "width": 2**12},
    "large samples": {"event_shape": [2**28]},
    "larger samples": {"event_shape": [2**20, 2**20]},
}


@pytest.mark.parametrize("asked", HUGE.values(), ids=HUGE)
def test_a_config_that_asks_for_more_than_is_stored_builds_nothing(saved, asked):
    """Compared before anything is built: what it asks for would take minutes or all memory."""
    config = json.loads((saved / "config.json").read_text())
    edit_config(saved, network={**config["network"], **asked})
    began = time.process_time()
    line = refusal(lambda: MetaFlowMap.from_pretrained(saved))
    assert str(saved / "config.json") in line
    assert time.process_time() - began < 1  # takes milliseconds


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, number):
    """A run that diverged: its map would draw NaN without a word."""
    model = make_model()
    with torch.no_grad():
        next(model.parameters()).flatten()[3] = number
    model.save_pretrained(tmp_path / "m")
    assert "numbers that are not finite, in " in refusal(lambda: MetaFlowMap.from_pretrained(tmp_path / "m"))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    def edited(edit):
        model = make_model()
        state = model.state_dict()
        edit(state)
        write_checkpoint(tmp_path / "m", {"model.safetensors": state}, {"config.json": model_config(model)})
        line = refusal(lambda: MetaFlowMap.from_pretrained(tmp_path / "m"))
        assert str(tmp_path / "m" / "model.safetensors") in line
        return line

    weight = "network.input.weight"
    line = edited(lambda s: s.update({weight: torch.zeros(3, 4)}))
    assert weight in line
    assert "(3, 4)" in line
    assert "missing: network.output.bias" in edited(lambda s: s.pop("network.output.bias"))
    assert "missing: data_mean" in edited(lambda s: s.pop("data_mean"))
    assert "unexpected: extra" in edited(lambda s: s.update(extra=torch.zeros(1)))
    assert "data_mean is (3,)" in edited(lambda s: s.update(data_mean=torch.zeros(3)))
    assert "torch.int64" in edited(lambda s: s.update({weight: torch.zeros_like(s[weight]).long()}))
    line = edited(lambda s: s.clear())
    assert "and 4 more" in line
    assert line.count("network.") == 2  # three of them, data_mean first


def test_networks_that_could_not_be_loaded_are_not_saved(tmp_path):
    class Other(torch.nn.Linear):
        event_shape = (2,)

    class Deeper(MLP):
        """It inherits the configuration of another network."""

    for network in (Other(2, 2), Deeper(MLPConfig(), (2,))):
        name = type(network).__name__
        with pytest.raises(InputError, match=rf"{name} cannot be saved.*NetworkConfig"):
            save_model(mfm.MetaFlowMap(network, mfm.LinearPath()), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="did you mean 'mlp'"):
        make_network({"name": "mlpp"})


def test_a_run_directory_means_its_newest_valid_checkpoint(tmp_path):
    run = tmp_path / "run"
    store = CheckpointStore(run / "checkpoints")
    store.root.mkdir(parents=True)
    assert "holds no valid checkpoint" in refusal(lambda: resolve_checkpoint(run))
    for step in (1, 2):
        save_step(store, step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_checkpoint(run).document("position.json")["step"] == 2
        assert resolve_checkpoint(store.root).document("position.json")["step"] == 2
        assert resolve_checkpoint(store.path(1)).document("position.json")["step"] == 1
    (store.path(2) / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"step-00000002/model\.safetensors") as caught:
        loaded = MetaFlowMap.from_pretrained(run, weights="raw")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert same(loaded.data_mean, make_model().data_mean + 1)
    (store.path(1) / "config.json").unlink()
    assert "step-00000002/model.safetensors" in refusal(lambda: resolve_checkpoint(run))


def test_hub_checkpoints_are_verified_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(make_model(), tmp_path / "snapshot")
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options["revision"]))
        assert options["allow_patterns"] == ["*.json", "*.safetensors"]
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(MetaFlowMap.from_pretrained("someone/gmm", revision="v1").data_mean, make_model().data_mean)
    assert asked == [("someone/gmm", "v1")]
    (tmp_path / "snapshot" / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in refusal(lambda: MetaFlowMap.from_pretrained("someone/gmm"))
    refusal(lambda: MetaFlowMap.from_pretrained("./someone/gmm"))
    refusal(lambda: MetaFlowMap.from_pretrained("gmm"))
    assert len(asked) == 2  # what cannot be a hub id is not asked for

    def offline(*args, **options):
        raise OSError("no network\nhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    line = refusal(lambda: MetaFlowMap.from_pretrained("someone/gmm"))
    assert line.startswith("someone/gmm: no such directory")
    assert "no network" in line


def test_push_uploads_a_verified_checkpoint(tmp_path, monkeypatch):
    class Api:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert private
            assert exist_ok
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, revision):
            if revision == "closed":
                raise OSError("403\nforbidden")
            shutil.copytree(folder_path, tmp_path / revision)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = make_model()
    options = {"private": True, "token": "secret"}
    assert model.push_to_hub("me/gmm", revision="main", **options) == "https://hub/me/gmm"
    assert same(MetaFlowMap.from_pretrained(tmp_path / "main").data_mean, model.data_mean)
    assert "403" in refusal(lambda: model.push_to_hub("me/gmm", revision="closed", **options))


# -- optimizer states ----------------------------------------------------------------------------------------


def same(a, b):
    """Equal to the bit and the type, NaNs included."""
    if type(a) is not type(b) and not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    if isinstance(a, torch.Tensor):
        data = [safetensors.torch.save({"": t.detach().clone().contiguous()}) for t in (a, b)]
        return data[0] == data[1]
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    return a == b


def through_files(state):
    tensors, document = flatten_state(state)
    data = safetensors.torch.save(writing._storable(tensors))
    return unflatten_state(safetensors.torch.load(data), json.loads(writing._json(document)))


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
shapes = st.lists(st.integers(0, 3), max_size=3)


def make_tensor(shape, dtype, flip):
    tensor = torch.arange(64)[: torch.Size(shape).numel()].view(shape).to(dtype)
    return tensor.mT if flip and tensor.ndim > 1 else tensor


tensors = st.builds(make_tensor, shapes, st.sampled_from(DTYPES), st.booleans())
keys = st.integers() | st.text(max_size=3)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(keys, nested, max_size=4))
def test_states_come_back_exactly(state):
    assert same(through_files(state), state)


def test_states_that_json_would_bend():
    shared = torch.ones(2)
    payload = struct.unpack(">d", bytes.fromhex("7ff8000000000abc"))[0]
    state = {1: 1.0, "1": 1, "f": [payload, -0.0, 5e-324, float("-inf")], "t": (shared, shared, shared[1:])}
    state |= {"tensor": {"tensor": "0"}, "dict": {"list": []}, (1, "a"): True, None: {}, "\ud800": 10**30}
    assert same(through_files(state), state)
    with pytest.raises(InputError, match=r"state\['a'\]\[0\] is a set"):
        flatten_state({"a": [{1}]})
    for document in ({"odd": 1}, {"tensor": "7"}, {"dict": [1]}, {"list": [], "tuple": []}, {"float": "zz"}):
        with pytest.raises(InputError, match="not a flattened state"):
            unflatten_state({}, document)


def test_an_optimizer_goes_on_as_if_never_stopped(tmp_path):
    def start():
        layer = torch.nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(6.0).view(2, 3) / 7)
            layer.bias.zero_()
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.9, 0.97))

    def train(layer, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            (layer(x) - 1).square().mean().backward()
            optimizer.step()

    straight, optimizer = start()
    train(straight, optimizer, range(6))
    layer, optimizer = start()
    train(layer, optimizer, range(3))
    tensors, document = flatten_state(optimizer.state_dict())
    write_checkpoint(
        tmp_path / "c",
        {"model.safetensors": layer.state_dict(), "optimizer.safetensors": tensors},
        {"config.json": {}, "position.json": {"optimizer": document}},
    )
    checkpoint = read_checkpoint(tmp_path / "c")
    layer, optimizer = start()
    layer.load_state_dict(checkpoint.tensors("model.safetensors"))
    skeleton = checkpoint.document("position.json")["optimizer"]
    optimizer.load_state_dict(unflatten_state(checkpoint.tensors("optimizer.safetensors"), skeleton))
    train(layer, optimizer, range(3, 6))
    assert torch.equal(layer.weight, straight.weight)
    assert torch.equal(layer.bias, straight.bias)
