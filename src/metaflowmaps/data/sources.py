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
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from metaflowmaps._files import read_regular
from metaflowmaps.data.pictures import DEEP, SUFFIXES, flat, picture_files
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.imagenet_names import class_index, wnids

NUMBERINGS = ("auto", "own", "imagenet")
PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
NO_CLASS = -1
MAX_CLASSES = 1_000_000
MAX_PIXELS = 2**27  # of a picture whose shorter side is the size: half a gigabyte
MAX_BYTES = 2**28  # of the file of a picture
MAX_LABEL_BYTES = 2**12
LOOKED_AT = 16  # pictures whose bytes tell one source from another with the same names


@dataclass(frozen=True)
class Classes:
    """The class of each picture, by number (NO_CLASS where there are none), and the names of all classes."""

    labels: list[int]
    names: tuple[str, ...] = ()


class PictureSource:
    """Pictures in a fixed order, as the bytes of their files, with their classes.

    Args:
        names: What the pictures are called inside the set, which no place on a disk enters.
        shown: What a message calls picture i.
        read: The bytes of picture i; called from several threads.
        classes: Their classes.
    """

    def __init__(
        self,
        names: Sequence[str],
        shown: Callable[[int], str],
        read: Callable[[int], bytes],
        classes: Classes,
    ) -> None:
        self.name, self.read = shown, read
        self.labels, self.class_names = classes.labels, classes.names
        self.fingerprint = _fingerprint(names, self.labels, read)  # the same set again?

    def __len__(self) -> int:
        return len(self.labels)


class BadPicture(InputError):
    """One picture that cannot be read."""


def open_source(place: str, classes: str = "auto") -> PictureSource:
    """The pictures at a folder, a tar, ``hf:owner/name[:split]`` or a dataset saved to disk.

    Args:
        place: Where they are.
        classes: How classes are numbered: "own" in the order of their names, "imagenet" as ImageNet is, "auto" as
            ImageNet where all of them are its WordNet ids.
    """
    if classes not in NUMBERINGS:
        raise unknown("numbering of classes", classes, NUMBERINGS)
    if place.startswith("hf:"):
        return _dataset(_from_hub(place), place, classes)
    path = Path(place).expanduser()
    if path.is_file():
        return _tars(path, [path], classes)
    if not path.is_dir():
        raise InputError(f"there is no {path.absolute()}: give a folder of pictures, a tar, or hf:owner/name[:split]")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _dataset(_from_disk(path), place, classes)
    tars = sorted(path.glob("*.tar"))
    folders = any(inside.is_dir() and not inside.name.startswith(".") for inside in path.iterdir())
    return _tars(path, tars, classes) if tars and not folders else _folder(path, classes)


def picture(source: PictureSource, i: int, size: int) -> np.ndarray:
    """Read and crop a picture.

    Args:
        source: The pictures.
        i: Which one.
        size: The side of the square, in pixels.

    Returns:
        (size, size, 3) uint8.
    """
    try:
        data = source.read(i)
    except OSError as error:  # a disk or a network that fails is no bad picture: leaving it out would be for good
        raise InputError(
            f"{source.name(i)} cannot be read ({error.strerror or error}): check the disk, then the same command again"
        ) from None
    except ValueError as error:
        raise _bad(source.name(i), error) from None
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.mode.startswith(DEEP):
                raise ValueError(f"more than 8 bits a channel, mode {opened.mode}")
            return np.array(centre_crop(flat(opened, 3), size))
    except MemoryError:
        raise
    except Exception as error:  # decoders meet damaged files with errors of every kind
        raise _bad(source.name(i), error) from None


def _bad(name: str, error: Exception) -> BadPicture:
    reason = "no picture of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
    reason = " ".join(reason.split())
    return BadPicture(
        f"{name} cannot be read ({type(error).__name__}: {reason[:120]}): replace or remove it, or leave such pictures "
        "out with --skip-bad"
    )


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of a picture, at size × size."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    if wide * high > MAX_PIXELS:
        raise ValueError(f"{image.width} × {image.height} is too long for its width")
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, upper = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, upper, left + size, upper + size))


# -- folders and tars ------------------------------------------------------------------------------------------------


def _folder(path: Path, classes: str) -> PictureSource:
    """Picture files under a folder."""
    files = picture_files(path)
    kept = _for_training(path, list(files))
    ordered = [files[name] for name in kept]
    return PictureSource(
        kept, lambda i: ordered[i], lambda i: read_regular(Path(ordered[i]), MAX_BYTES), _by_folder(path, kept, classes)
    )


class _Member(NamedTuple):
    """A plain file inside a tar."""

    tar: Path
    offset: int
    size: int

    def read(self, most: int = MAX_BYTES) -> bytes:
        if self.size > most:
            raise InputError(f"a member of {self.tar} has {self.size:,} bytes, and at most {most:,} are read")
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def _tars(path: Path, tars: list[Path], classes: str) -> PictureSource:
    """The pictures of uncompressed tar files, read in place."""
    found: dict[str, _Member] = {}
    for tar in tars:
        prefix = f"{tar.stem}/" if len(tars) > 1 or path.is_dir() else ""
        found.update((prefix + name, member) for name, member in _members(tar))
    kept = _for_training(path, [name for name in found if _is_picture(name)])
    members = [found[name] for name in kept]
    web = any(name.endswith(".cls") for name in found)
    known = _by_key(kept, found, classes) if web else _by_folder(path, kept, classes)
    return PictureSource(kept, lambda i: f"{members[i].tar}, member {kept[i]}", lambda i: members[i].read(), known)


def _by_key(names: list[str], found: dict[str, _Member], classes: str) -> Classes:
    """Classes of a WebDataset, where ``key.jpg`` has its own in ``key.cls``: whole numbers, or names."""
    given = []
    for name in names:
        folder, slash, last = name.rpartition("/")
        key = last.split(".", 1)[0]
        label = found.get(f"{folder}{slash}{key}.cls")
        if label is None:
            raise InputError(f"{found[name].tar}: {name} has no {key}.cls beside it")
        given.append(label.read(MAX_LABEL_BYTES).decode(errors="replace").strip())
    if all(word.isdecimal() for word in given):
        return _by_number([int(word) for word in given], classes)
    return _by_name(given, classes)


def _members(tar: Path) -> Iterator[tuple[str, _Member]]:
    """The plain files of a tar by name, those of tars in it as if these were folders."""
    try:
        with tar.open("rb") as file:
            head = file.read(8)
            for magic, command in PACKED.items():
                if head.startswith(magic):
                    raise InputError(f"{tar} is compressed and cannot be read in place: unpack it with {command} first")
            yield from _inside(tar, file, 0, tar.stat().st_size, "")
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{tar} is not a whole tar file ({error}): fetch it again, or give a folder") from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{tar} cannot be read ({reason}): check the disk and its permissions") from None


def _inside(tar: Path, file: BinaryIO, start: int, size: int, prefix: str) -> Iterator[tuple[str, _Member]]:
    file.seek(start)  # from where tarfile reads on: its offsets are those of the whole file
    with tarfile.open(fileobj=file, mode="r:") as opened:
        for entry in opened:
            name = prefix + entry.name.removeprefix("./")
            if entry.offset_data + entry.size > start + size:
                raise tarfile.ReadError(f"{name} ends beyond the end of the file")
            if entry.isfile() and name.endswith(".tar"):
                yield from _inside(tar, file, entry.offset_data, entry.size, name.removesuffix(".tar") + "/")
            elif entry.isfile():
                yield name, _Member(tar, entry.offset_data, entry.size)


# -- datasets --------------------------------------------------------------------------------------------------------


def _dataset(rows: Any, place: str, classes: str) -> PictureSource:
    """A dataset of the package ``datasets``: its picture column and its class column."""
    import datasets

    kinds = rows.features
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    if len(images) != 1 or not len(rows):
        raise InputError(
            f"{place}: {len(rows):,} rows with the picture columns {', '.join(images) or 'none'} (of "
            f"{', '.join(kinds)}): a dataset with rows and one column of type Image is needed"
        )
    named = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    named += [name for name in ("label", "labels", "cls", "class") if name in kinds]
    known = Classes([NO_CLASS] * len(rows))
    if named:
        known = _by_column(list(rows[named[0]]), kinds[named[0]], f"{place}, {named[0]}", classes)
    # as bytes: decoded here, like every other source
    pictures = rows.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    lock = threading.Lock()

    def read(i: int) -> bytes:
        with lock:
            cell = pictures[i][images[0]]
        if cell is None:
            raise ValueError("no picture in this row")
        data: bytes = cell["bytes"] if cell["bytes"] is not None else read_regular(Path(cell["path"]), MAX_BYTES)
        return data

    return PictureSource([str(i) for i in range(len(rows))], lambda i: f"{place}, row {i}", read, known)


def _by_column(given: list[Any], kind: Any, what: str, classes: str) -> Classes:
    names = getattr(kind, "names", None)
    numbers = all(isinstance(x, int) and x >= 0 for x in given)
    if names is not None and numbers and max(given) < len(names):
        if classes == "imagenet" or (classes == "auto" and set(names) <= set(wnids())):
            index = [class_index(name) for name in names]
            return Classes([index[x] for x in given], wnids())
        return Classes(given, tuple(names))
    if numbers:
        return _by_number(given, classes)
    if all(isinstance(x, str) for x in given):
        return _by_name(given, classes)
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


def _by_folder(path: Path, names: list[str], classes: str) -> Classes:
    folders = [name.split("/")[-2] if "/" in name else "" for name in names]
    if not any(folders):
        return Classes([NO_CLASS] * len(names))
    if not all(folders):
        stray = names[folders.index("")]
        raise InputError(f"{path}: {stray} lies in no class folder, others do: move it into one, or give one folder")
    return _by_name(folders, classes)


def _by_name(given: list[str], classes: str) -> Classes:
    own = sorted(set(given))
    if classes == "imagenet" or (classes == "auto" and set(own) <= set(wnids())):
        number = {name: class_index(name) for name in own}
        return Classes([number[name] for name in given], wnids())
    number = {name: i for i, name in enumerate(own)}
    return Classes([number[name] for name in given], tuple(own))


def _by_number(numbers: list[int], classes: str) -> Classes:
    count = max(numbers) + 1
    if classes == "imagenet":
        class_index(count - 1)
        return Classes(numbers, wnids())
    if count > MAX_CLASSES:
        raise InputError(f"class {count - 1} is no number of a class: classes are counted from 0")
    return Classes(numbers, tuple(map(str, range(count))))


def _fingerprint(names: Sequence[str], labels: list[int], read: Callable[[int], bytes]) -> str:
    """Of all names and classes, and of the bytes of some pictures, spread over the set."""
    lines = (f"{name} {label}\n" for name, label in zip(names, labels, strict=True))
    hashed = hashlib.sha256("".join(lines).encode(errors="surrogateescape"))
    for i in {k * (len(names) - 1) // (LOOKED_AT - 1): None for k in range(LOOKED_AT)}:
        with suppress(OSError, ValueError):  # one that is not there is told when its turn comes
            hashed.update(hashlib.sha256(read(i)).digest())
    return hashed.hexdigest()
