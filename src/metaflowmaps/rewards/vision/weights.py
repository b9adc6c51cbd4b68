"""PublishedWeights weights of vision models: found in a file, a folder or on the hub, and read without running code."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError

PREPROCESSOR = ("preprocessor_config.json", "processor_config.json")  # in older and in newer folders


class PublishedWeights(NamedTuple):
    """Where something was published: a hub id, the commit that is taken of it, and the name of its file."""

    hub: str
    commit: str
    file: str = ""

    def at(self, place: str | Path | None, revision: str | None = None) -> tuple[str, str | None]:
        """A place and a revision: here, at the pinned commit, where nothing else is said."""
        name = self.hub if place is None else str(place)
        return name, self.commit if name == self.hub and revision is None else revision

    def path(self, place: str | Path, revision: str | None, file: str) -> Path:
        """The file at a place: itself, in a folder, or of a hub id."""
        return fetched(*self.at(place, revision), (file,))


class Weights(dict[str, Tensor]):
    """Named tensors that ought to be the weights of ``what``; a name that is asked for and missing is refused."""

    def __init__(self, state: Mapping[str, Tensor], what: str) -> None:
        super().__init__(state)
        self.what = what

    def __missing__(self, key: str) -> Tensor:
        raise self.refused(f"missing: {key}")

    def refused(self, why: str) -> InputError:
        """What to say of weights that are others."""
        return InputError(f"these are not the weights of {self.what} ({why}): give its published file")

    def check(self, wanted: Mapping[str, Tensor]) -> None:
        """Refuse weights of other names or shapes, with a list of them."""
        problems = {
            "missing": [key for key in wanted if key not in self],
            "unknown": [key for key in self if key not in wanted],
            "other shapes": [key for key in wanted if key in self and self[key].shape != wanted[key].shape],
        }
        lines = [f"{title}: {', '.join(keys[:3])}" for title, keys in problems.items() if keys]
        if lines:
            raise self.refused("; ".join(lines))

    def depth(self, prefix: str) -> int:
        """How many numbered layers there are under ``prefix``."""
        return len({key[len(prefix) :].split(".")[0] for key in self if key.startswith(prefix)})


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under other names: each pattern that is found in a name is replaced, in turn."""

    def new(key: str) -> str:
        for pattern, replacement in names.items():
            key = re.sub(pattern, replacement, key)
        return key

    return {new(key): value for key, value in state.items()}


def transformers(who: str) -> ModuleType:
    """The package, when it is needed."""
    try:
        import transformers as package
    except ImportError:
        raise InputError(f"{who} needs transformers: pip install 'metaflowmaps[rewards]'") from None
    return package


def pretrained(kind: str, name: str | Path, revision: str | None, **options: Any) -> Any:
    """``from_pretrained`` of a class of transformers, by the name of the class."""
    with loading(name):
        return getattr(transformers(str(name)), kind).from_pretrained(name, revision=revision, **options)


@contextmanager
def loading(name: str | Path) -> Iterator[None]:
    """Whatever goes wrong while ``name`` is found and read, in one line."""
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise InputError(
            f"{name} cannot be loaded ({_brief(error)}): give a file, a folder, or a hub id and revision that exist"
        ) from error


def fetched(place: str | Path, revision: str | None, names: Sequence[str]) -> Path:
    """The first of these files that a folder, or a hub id at a revision, has; ``place`` itself where that is a file."""
    local = Path(place).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        found = next((local / name for name in names if (local / name).is_file()), None)
        if found is None:
            raise InputError(f"{local} holds no {' or '.join(names)}: give the folder that does, or the file itself")
        return found
    with loading(f"{place}/{names[0]}"):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        for name in names[:-1]:
            with suppress(EntryNotFoundError):
                return Path(hf_hub_download(str(place), name, revision=revision))
        return Path(hf_hub_download(str(place), names[-1], revision=revision))


def read_tensors(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """The named tensors of a .pt or .safetensors file, of its entry ``inside`` where there is one; no code is run."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" in str(error).lower():
            raise InputError(
                f"{path} is refused: its pickle holds more than tensors and would run code; in a Python you trust it "
                "in, save its state_dict as .safetensors"
            ) from None
        raise InputError(f"{path} is damaged or no file of weights ({_brief(error)}): fetch it again") from None
    if inside is not None and isinstance(held, Mapping):
        held = held.get(inside, held)
    if not isinstance(held, Mapping) or not held or not all(isinstance(v, Tensor) for v in held.values()):
        raise InputError(f"{path} holds no dictionary of tensors: give the file that was published")
    return {str(key).removeprefix("module."): value for key, value in held.items()}


def filled(kind: Any, config: Any, state: Mapping[str, Tensor], what: str, **options: Any) -> nn.Module:
    """A model of transformers with exactly these weights; other keys or shapes are refused."""
    with torch.device("meta"):
        Weights(state, what).check(kind(config, **options).state_dict())
    # half precision is for files; what computes in it is asked for by dtype=
    dtype = torch.promote_types(next(iter(state.values())).dtype, torch.float32)
    model: nn.Module = kind.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype, **options)
    return model


def linear_chain(state: Mapping[str, Tensor], width: int, what: str) -> nn.Sequential:
    """The linear layers whose keys are ``layers.N.weight`` and ``.bias``, in the order of N, from width to 1.

    Between them the published heads have dropout and nothing else, which does nothing in use.
    """
    layers = Weights({key.removeprefix("layers."): value for key, value in state.items()}, what)
    numbers = sorted({key.partition(".")[0] for key in layers if key[0].isdecimal()}, key=int)
    dtype = torch.promote_types(next(iter(state.values()), torch.zeros(0)).dtype, torch.float32)
    chain, widths = nn.Sequential(), [width]
    for number in numbers:
        rows, columns = layers[f"{number}.weight"].shape
        if columns != widths[-1]:
            break
        chain.add_module(number, nn.Linear(columns, rows, dtype=dtype))
        widths.append(rows)
    if len(chain) < len(numbers) or (numbers and widths[-1] != 1):
        raise InputError(f"the layers of {what} must lead from {width} numbers to 1, got {widths[1:]}")
    layers.check(chain.state_dict())
    chain.load_state_dict(layers)
    return chain


def _brief(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
