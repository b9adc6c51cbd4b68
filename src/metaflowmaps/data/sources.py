r"""Where pictures to encode come from: a folder, tar files, or a Hugging Face dataset; one order, random access.

**Folder, tar.** The class of a picture is the folder it lies in (``n01440764/n01440764_18.JPEG``); where there is a
folder ``train`` on the way, only what lies in it counts. A tar may hold tars, as ILSVRC2012_img_train.tar does: each
stands for a folder of its name. So do the tars of a folder of tars. A WebDataset has the class of ``key.jpg`` in
``key.cls`` instead. Order is that of the names, so that a folder and its tar are the same set.

**Dataset.** ``hf:owner/name[:split]`` from the hub, or the folder of a dataset saved to disk: the picture column and,
if there is one, the class column, in the order of the rows.

Classes are numbered in the order of their names; if all of them are WordNet ids of ImageNet's 1,000, as ImageNet is.

**Crop** (that of ADM, whose statistics FID is measured by): while the shorter side is at least twice the size, halve
by box averages; then bicubic until the shorter side is the size; then the centre.
"""

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from metaflowmaps.data.imagenet import class_index, wnids
from metaflowmaps.data.pictures import DEEP, SUFFIXES, flat
from metaflowmaps.errors import InputError, unknown

NUMBERINGS = ("auto", "own", "imagenet")
PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
NO_CLASS = -1
MAX_CLASSES = 1_000_000
MOST = 2**27  # pixels of a picture whose shorter side is the size: half a gigabyte
LOOKED_AT = 16  # pictures whose bytes tell one source from another with the same names


class Source(Protocol):
    """Pictures in a fixed order, as the bytes of their files, with their classes (NO_CLASS where there are none)."""

    class_names: tuple[str, ...]
    labels: list[int]
    fingerprint: str  # of names, classes and some pictures: the same set again?

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What a message calls picture i."""

    def read(self, i: int) -> bytes:
        """The bytes of picture i; safe to call from several threads."""


class BadPicture(InputError):
    """One picture that cannot be read."""


def open_source(place: str, classes: str = "auto") -> Source:
    """The pictures at a folder, a tar, ``hf:owner/name[:split]`` or a dataset saved to disk."""
    if classes not in NUMBERINGS:
        raise unknown("numbering of classes", classes, NUMBERINGS)
    if place.startswith("hf:"):
        return Dataset(_from_hub(place), place, classes)
    path = Path(place).expanduser()
    if path.is_file():
        return Tars(path, [path], classes)
    if not path.is_dir():
        raise InputError(f"there is no {path.absolute()}: give a folder of pictures, a tar, or hf:owner/name[:split]")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return Dataset(_from_disk(path), place, classes)
    tars = sorted(path.glob("*.tar"))
    folders = any(inside.is_dir() and not inside.name.startswith(".") for inside in path.iterdir())
    return Tars(path, tars, classes) if tars and not folders else Folder(path, classes)


def picture(source: Source, i: int, size: int) -> np.ndarray:
    """Picture i, cropped: (size, size, 3) uint8."""
    try:
        data = source.read(i)
    except OSError as error:  # a disk or a network that fails is no bad picture: leaving it out would be for good
        raise InputError(
            f"{source.name(i)} cannot be read ({error.strerror or error}): check the disk, then the same command again"
        ) from None
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.mode.startswith(DEEP):
                raise ValueError(f"more than 8 bits a channel, mode {opened.mode}")
            return np.array(centre_crop(flat(opened, 3), size))
    except MemoryError:
        raise
    except Exception as error:  # decoders meet damaged files with errors of every kind
        reason = "no picture of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        reason = " ".join(reason.split())
        raise BadPicture(
            f"{source.name(i)} cannot be read ({type(error).__name__}: {reason[:120]}): replace or remove it, "
            "or leave such pictures out with --skip-bad"
        ) from None


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of a picture, at size × size."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    if wide * high > MOST:
        raise ValueError(f"{image.width} × {image.height} is too long for its width")
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, upper = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, upper, left + size, upper + size))


# -- folders and tars ------------------------------------------------------------------------------------------------


class Folder:
    """Picture files under a folder."""

    def __init__(self, path: Path, classes: str = "auto") -> None:
        found = {}
        for folder, inside, names in os.walk(path, onerror=_no_folder, followlinks=True):
            inside[:] = [name for name in inside if not name.startswith(".")]
            base = Path(folder).relative_to(path).as_posix()
            for name in names:
                if _is_picture(name):
                    found[name if base == "." else f"{base}/{name}"] = f"{folder}/{name}"
        kept = _for_training(path, list(found))
        self._files = [found[name] for name in kept]
        self.labels, self.class_names = _by_folder(path, kept, classes)
        self.fingerprint = _fingerprint(kept, self.labels, self.read)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, i: int) -> str:
        return self._files[i]

    def read(self, i: int) -> bytes:
        return Path(self._files[i]).read_bytes()


def _no_folder(error: OSError) -> None:
    # left out, a class would be missing and others be numbered otherwise
    raise InputError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from None


class _Member(NamedTuple):
    """A picture inside a tar file."""

    tar: int
    offset: int
    size: int
    name: str


class Tars:
    """The pictures of uncompressed tar files, read in place."""

    def __init__(self, path: Path, tars: list[Path], classes: str = "auto") -> None:
        self._tars = tars
        self._handles: dict[int, int] = {}
        self._lock = threading.Lock()
        found: dict[str, _Member] = {}
        for number, tar in enumerate(tars):
            prefix = f"{tar.stem}/" if len(tars) > 1 or path.is_dir() else ""
            for member in _members(tar, number):
                found[prefix + member.name] = member._replace(name=prefix + member.name)
        kept = _for_training(path, [name for name in found if _is_picture(name)])
        self._members = [found[name] for name in kept]
        cls = {name.removesuffix(".cls"): member for name, member in found.items() if name.endswith(".cls")}
        if cls:
            self.labels, self.class_names = self._web_labels(cls, classes)
        else:
            self.labels, self.class_names = _by_folder(path, kept, classes)
        self.fingerprint = _fingerprint([m.name for m in self._members], self.labels, self.read)

    def __len__(self) -> int:
        return len(self._members)

    def name(self, i: int) -> str:
        return f"{self._tars[self._members[i].tar]}, member {self._members[i].name}"

    def read(self, i: int) -> bytes:
        return self._bytes(self._members[i])

    def _bytes(self, member: _Member) -> bytes:
        with self._lock:
            if member.tar not in self._handles:
                self._handles[member.tar] = os.open(self._tars[member.tar], os.O_RDONLY)
        return os.pread(self._handles[member.tar], member.size, member.offset)

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)

    def _web_labels(self, cls: dict[str, _Member], classes: str) -> tuple[list[int], tuple[str, ...]]:
        """Classes of a WebDataset: whole numbers, or names."""
        given = []
        for member in self._members:
            folder, slash, name = member.name.rpartition("/")
            key = folder + slash + name.split(".", 1)[0]
            if key not in cls:
                raise InputError(
                    f"{self._tars[member.tar]}: {member.name} has no {name.split('.', 1)[0]}.cls beside it"
                )
            given.append(self._bytes(cls[key]).decode(errors="replace").strip())
        if not all(word.isdecimal() for word in given):
            return _numbered(given, classes)
        numbers = [int(word) for word in given]
        return numbers, _names_of_numbers(numbers, classes)


def _members(tar: Path, number: int) -> Iterator[_Member]:
    """The plain files of a tar, and of the tars in it as folders."""
    try:
        with tar.open("rb") as file:
            head = file.read(8)
            for magic, command in PACKED.items():
                if head.startswith(magic):
                    raise InputError(f"{tar} is compressed and cannot be read in place: unpack it with {command} first")
            yield from _inside(tar, file, 0, tar.stat().st_size, number, "")
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{tar} is not a whole tar file ({error}): fetch it again, or give a folder") from None
    except OSError as error:
        raise InputError(
            f"{tar} cannot be read ({error.strerror or error}): check the disk and its permissions"
        ) from None


def _inside(tar: Path, file: Any, start: int, size: int, number: int, prefix: str) -> Iterator[_Member]:
    with tarfile.open(fileobj=_Window(file, start, size), mode="r:") as opened:
        for entry in opened:
            if not entry.isfile():
                continue
            offset, name = start + entry.offset_data, prefix + entry.name.removeprefix("./")
            if entry.offset_data + entry.size > size:
                raise tarfile.ReadError(f"{name} ends beyond the end of the file")
            if name.endswith(".tar"):
                yield from _inside(tar, file, offset, entry.size, number, name.removesuffix(".tar") + "/")
            else:
                yield _Member(number, offset, entry.size, name)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: Any, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._start + self._at)
        data: bytes = self._file.read(left if count < 0 else min(count, left))
        self._at += len(data)
        return data


# -- datasets --------------------------------------------------------------------------------------------------------


class Dataset:
    """A dataset of the package ``datasets``: its picture column and its class column."""

    def __init__(self, rows: Any, place: str, classes: str = "auto") -> None:
        import datasets

        kinds = rows.features
        images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
        if len(images) != 1 or not len(rows):
            raise InputError(
                f"{place}: {len(rows):,} rows with the picture columns {', '.join(images) or 'none'} (of "
                f"{', '.join(kinds)}): a dataset with rows and one column of type Image is needed"
            )
        # as bytes: decoded here, like every other source
        self._rows = rows.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
        self._place, self._column, self._lock = place, images[0], threading.Lock()
        column = next((name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)), None)
        column = column or next((name for name in ("label", "labels", "cls", "class") if name in kinds), None)
        if column is None:
            self.labels, self.class_names = [NO_CLASS] * len(rows), tuple[str, ...]()
        else:
            self.labels, self.class_names = _of_column(list(rows[column]), kinds[column], f"{place}, {column}", classes)
        self.fingerprint = _fingerprint(list(map(str, range(len(rows)))), self.labels, self.read)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> str:
        return f"{self._place}, row {i}"

    def read(self, i: int) -> bytes:
        with self._lock:
            cell = self._rows[i][self._column]
        if cell is None:
            raise ValueError("no picture in this row")
        data: bytes = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        return data


def _of_column(given: list[Any], kind: Any, what: str, classes: str) -> tuple[list[int], tuple[str, ...]]:
    names = getattr(kind, "names", None)
    if names is not None and all(isinstance(x, int) and 0 <= x < len(names) for x in given):
        if classes == "imagenet" or (classes == "auto" and set(names) <= set(wnids())):
            index = [class_index(name) for name in names]
            return [index[x] for x in given], wnids()
        return given, tuple(names)
    if all(isinstance(x, int) and x >= 0 for x in given):
        return given, _names_of_numbers(given, classes)
    if all(isinstance(x, str) for x in given):
        return _numbered(given, classes)
    wrong = next(x for x in given if not isinstance(x, int | str) or (isinstance(x, int) and x < 0))
    raise InputError(f"{what} holds {wrong!r}: every row needs a class, a whole number from 0 or a name")


def _from_hub(place: str) -> Any:
    name, _, split = place.removeprefix("hf:").partition(":")
    owner, _, rest = name.partition("/")
    repository, _, config = rest.partition("/")
    if not owner or not repository:
        raise InputError(f"{place} is not hf:owner/name, hf:owner/name:split or hf:owner/name/configuration:split")
    load = _package().load_dataset
    return _opened(place, lambda: load(f"{owner}/{repository}", config or None, split=split or "train"))


def _from_disk(path: Path) -> Any:
    found = _opened(str(path), lambda: _package().load_from_disk(str(path)))
    if not isinstance(found, dict):
        return found
    if "train" not in found and len(found) != 1:
        raise InputError(f"{path} holds the splits {', '.join(found)} and no train: give one of their folders")
    return found["train"] if "train" in found else next(iter(found.values()))


def _package() -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError("Hugging Face datasets need a package: pip install 'metaflowmaps[data]'") from None
    return datasets


def _opened(place: str, load: Any) -> Any:
    try:
        return load()
    except InputError:
        raise
    except Exception as error:  # the hub, the disk and the parsers have many kinds
        reason = " ".join(str(error).split())
        raise InputError(
            f"the dataset {place} cannot be opened ({type(error).__name__}: {reason[:160]}): give "
            "hf:owner/name[:split], or the folder that save_to_disk wrote"
        ) from error


# -- names and classes -----------------------------------------------------------------------------------------------


def _is_picture(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.lower().endswith(SUFFIXES) and not last.startswith(".")


def _for_training(path: Path, names: list[str]) -> list[str]:
    """The names in their order; of those below a folder ``train``, if there are any, only they, from there."""
    if not names:
        raise InputError(
            f"no pictures in {path.absolute()} ({', '.join(s[1:] for s in SUFFIXES)}): give a folder of class folders, "
            "a tar of it, or hf:owner/name[:split]"
        )
    inside = [name for name in names if "train" in name.split("/")[:-2]]
    return sorted(inside or names)


def _by_folder(path: Path, names: list[str], classes: str) -> tuple[list[int], tuple[str, ...]]:
    folders = [name.split("/")[-2] if "/" in name else "" for name in names]
    if not any(folders):
        return [NO_CLASS] * len(names), ()
    if not all(folders):
        stray = names[folders.index("")]
        raise InputError(f"{path}: {stray} lies in no class folder, others do: move it into one, or give one folder")
    return _numbered(folders, classes)


def _numbered(given: list[str], classes: str) -> tuple[list[int], tuple[str, ...]]:
    own = sorted(set(given))
    if classes == "imagenet" or (classes == "auto" and set(own) <= set(wnids())):
        number = {name: class_index(name) for name in own}
        return [number[name] for name in given], wnids()
    number = {name: i for i, name in enumerate(own)}
    return [number[name] for name in given], tuple(own)


def _names_of_numbers(numbers: list[int], classes: str) -> tuple[str, ...]:
    count = max(numbers) + 1
    if classes == "imagenet":
        class_index(count - 1)
        return wnids()
    if count > MAX_CLASSES:
        raise InputError(f"class {count - 1} is no number of a class: classes are counted from 0")
    return tuple(map(str, range(count)))


def _fingerprint(names: list[str], labels: list[int], read: Callable[[int], bytes]) -> str:
    """Of all names and classes, and of the bytes of some pictures, spread over the set."""
    lines = (f"{name} {label}\n" for name, label in zip(names, labels, strict=True))
    hashed = hashlib.sha256("".join(lines).encode(errors="surrogateescape"))
    for i in {k * (len(names) - 1) // (LOOKED_AT - 1): None for k in range(LOOKED_AT)}:
        with suppress(OSError, ValueError):  # one that is not there is told when its turn comes
            hashed.update(hashlib.sha256(read(i)).digest())
    return hashed.hexdigest()
