"""Published weights of vision models: found in a file, a folder or on the hub, and read without running code."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError

PREPROCESSOR = ("preprocessor_config.json", "processor_config.json")  # in older and in newer folders


def transformers(who: str) -> ModuleType:
    """The package, when it is needed."""
    try:
        import transformers as package
    except ImportError:
        raise InputError(f"{who} needs transformers: pip install 'metaflowmaps[rewards]'") from None
    return package


@contextmanager
def loading(name: str | Path) -> Iterator[None]:
    """Whatever goes wrong while ``name`` is found and read, in one line."""
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"{name} cannot be loaded ({line[:160]}): give a file, a folder, or a hub id and revision that exist"
        ) from error


def fetched(place: str | Path, names: Sequence[str], revision: str | None) -> Path:
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


def published(place: str | Path, file: str, revision: str | None, usual: tuple[str, str]) -> Path:
    """A published file, at its pinned revision unless another is given.

    Args:
        place: the file, its folder, or a hub id.
        file: its name there.
        revision: of the hub id.
        usual: the hub id it was published under, and the revision to take of that.
    """
    return fetched(place, (file,), usual[1] if str(place) == usual[0] and revision is None else revision)


def published_tokenizer(place: str | Path | None, usual: tuple[str, str]) -> Any:
    """The tokenizer in a folder or of a hub id; None: the usual one, at its pinned revision."""
    name, revision = usual if place is None else (str(place), None)
    with loading(name):
        return transformers(name).AutoTokenizer.from_pretrained(name, revision=revision)


def read_tensors(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """The named tensors of a .pt or .safetensors file, of its entry ``inside`` where there is one; no code is run."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the path") from None
    except Exception as error:
        if "weights_only" in str(error).lower():
            raise InputError(
                f"{path} is refused: its pickle holds more than tensors and would run code; in a Python you trust it "
                "in, save its state_dict as .safetensors"
            ) from None
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{path} is damaged or no file of weights ({line[:120]}): fetch it again") from None
    if inside is not None and isinstance(held, Mapping) and isinstance(held.get(inside), Mapping):
        held = held[inside]
    if not isinstance(held, Mapping) or not all(isinstance(v, Tensor) for v in held.values()) or not held:
        raise InputError(f"{path} holds no dictionary of tensors: give the file that was published")
    return {str(key).removeprefix("module."): value for key, value in held.items()}


def filled(kind: Any, config: Any, state: Mapping[str, Tensor], what: str, **options: Any) -> nn.Module:
    """A model of transformers with exactly these weights; other keys or shapes are listed in one line."""
    with torch.device("meta"):
        wanted = kind(config, **options).state_dict()
    check_keys(wanted, state, what)
    # half precision is for files; what computes in it is asked for by dtype=
    dtype = torch.promote_types(next(iter(state.values())).dtype, torch.float32)
    model: nn.Module = kind.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype, **options)
    return model


def check_keys(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are not these, in one line."""
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    problems = [
        f"{title}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for title, keys in (
            ("missing", [key for key in wanted if key not in given]),
            ("unknown", [key for key in given if key not in wanted]),
            ("other shapes", shapes),
        )
        if keys
    ]
    if problems:
        raise InputError(f"these are not the weights of {what} ({'; '.join(problems)}): give its published file")


def needed(state: Mapping[str, Tensor], key: str, what: str) -> Tensor:
    """state[key]; one line where it is not there."""
    if key not in state:
        raise InputError(f"these are not the weights of {what} (missing: {key}): give its published file")
    return state[key]


def depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered layers there are under ``prefix``."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def linear_chain(state: Mapping[str, Tensor], width: int, what: str) -> nn.Sequential:
    """The linear layers whose keys are ``layers.N.weight`` and ``.bias``, in the order of N, from width to 1.

    Between them the published heads have dropout and nothing else, which does nothing in use.
    """
    numbers = sorted({int(key.split(".")[1]) for key in state if key.startswith("layers.") and key.count(".") == 2})
    shapes = [needed(state, f"layers.{i}.weight", what).shape for i in numbers]
    dtype = torch.promote_types(next(iter(state.values()), torch.zeros(0)).dtype, torch.float32)
    layers = [nn.Linear(columns, rows, dtype=dtype) for rows, columns in shapes]
    chain = nn.Sequential(*layers)
    named = {f"{k}.{part}": needed(state, f"layers.{i}.{part}", what)
             for k, i in enumerate(numbers) for part in ("weight", "bias")}  # fmt: skip
    if not layers or len(named) != len(state):
        raise InputError(f"these are not the weights of {what} (a chain of linear layers): give its published file")
    widths = [width, *(layer.out_features for layer in layers)]
    if [layer.in_features for layer in layers] != widths[:-1] or widths[-1] != 1:
        raise InputError(f"the layers of {what} must lead from {width} numbers to 1, got {widths[1:]}")
    chain.load_state_dict(named)
    return chain
