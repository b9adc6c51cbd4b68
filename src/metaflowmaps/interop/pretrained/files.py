"""Published weights as named tensors: from a file, a folder or the hub, whatever they are wrapped in.

``.safetensors`` files are read as they are, ``.pt`` and its kin by torch's restricted unpickler, which knows tensors
and plain containers and runs no code: a pickle that needs more is refused. What training scripts wrap around the
weights (an ``ema`` or ``model`` dictionary, ``module.`` or ``model.`` before a key) is taken off.
"""

import re
from collections.abc import Mapping
from hashlib import file_digest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from metaflowmaps._files import check_regular
from metaflowmaps.errors import InputError

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED)
HUB_FILE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[\w./-]+))?")
HUB_FILES = {  # what to take where no file is named
    "adh1s/mfm": "mfm-xl2.pt",
    "kyungmnlee/DMF": "dmf_xl_2_256.pt",
    "nyu-visionx/SiT-collections": "SiT-XL-2-256.pt",
}
NESTED = ("ema", "model_ema", "state_dict", "model", "module", "net")  # the averaged weights first
PREFIXES = ("module.", "_orig_mod.", "ema_model.", "ema.", "model.", "net.", "dit.")


class WeightsOrigin(NamedTuple):
    """Where weights were read from, as a model card says it; of a local file, its hash; what of it is not used."""

    name: str
    revision: str | None
    sha256: str | None = None
    left_out: tuple[str, ...] = ()  # harmless tensors that the map has no use for

    @property
    def note(self) -> str:
        """What was left out, in one line; empty where nothing was."""
        return f"{self.name}: left out what the map does not use: {', '.join(self.left_out)}" if self.left_out else ""


def read_weights(path: str | Path, revision: str | None = None) -> tuple[dict[str, Tensor], WeightsOrigin]:
    """The tensors of a file, of the one weights file in a folder, or of ``owner/name[/file][@revision]`` on the hub."""
    local, source = Path(path).expanduser(), None
    if not local.exists():
        local, source = _download(str(path), revision)
    if local.is_dir():
        local = _only_file(local)
    check_regular(local)
    if local.suffix not in SUFFIXES:
        raise InputError(f"{local}: weights are read from {', '.join(SUFFIXES)}, not from {local.suffix or 'this'}")
    weights = bare(_unwrapped(_tensors(local), local), local)
    return weights, source or WeightsOrigin(Path(path).expanduser().absolute().name, None, _sha256(local))


def holds_weights(folder: Path) -> bool:
    """Is this a folder of published weights, and not a checkpoint or a run of ours?

    Args:
        folder: that exists.

    Returns:
        Whether it is.
    """
    ours = (folder / "manifest.json").exists() or (folder / "checkpoints").exists()
    return not ours and any(file.suffix in SUFFIXES for file in folder.iterdir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def bare(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Each key without what stands before it: a training module may hold tensors of its own beside the network."""
    named: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for key, value in weights.items():
        short = _without_prefixes(key)
        if short in named:
            raise InputError(
                f"{path} holds two tensors {short} ({first[short]} and {key}): save the weights that are meant alone"
            )
        named[short], first[short] = value, key
    if not named:
        raise InputError(f"{path} holds no tensors: give a file of weights")
    return named


def _without_prefixes(key: str) -> str:
    while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
        key = key.removeprefix(prefix)
    return key


def _tensors(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_mappable(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the path") from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error}): fetch it again") from None
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error) or "GLOBAL" in str(error):
            fix = "it holds more than tensors; in a Python you trust it in, save its state_dict as .safetensors"
            raise InputError(f"{path} is refused, its pickle would run code: {fix}") from None
        raise InputError(f"{path} is damaged or no file of weights ({line}): fetch it again") from None


def _mappable(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"  # the zip format; older pickles cannot be mapped


def _unwrapped(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors inside; the averaged one where there are several."""
    while isinstance(loaded, Mapping):
        held = {str(key): value for key, value in loaded.items()}
        if held and all(isinstance(value, Tensor) for value in held.values()):
            return held
        inner = next((held[key] for key in NESTED if isinstance(held.get(key), Mapping) and held[key]), None)
        if inner is None:
            tensors = {key: value for key, value in held.items() if isinstance(value, Tensor)}
            if tensors:  # beside numbers, such as a step count
                return tensors
            break
        loaded = inner
    found = ", ".join(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
    raise InputError(f"{path} holds no dictionary of tensors (found: {found[:80]}): give a file of weights")


def _only_file(folder: Path) -> Path:
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:5]) or "none"
        raise InputError(f"{folder} holds {len(files)} files of weights ({names}): name the one that is meant")
    return files[0]


def _download(name: str, revision: str | None) -> tuple[Path, WeightsOrigin]:
    match = HUB_FILE.fullmatch(name)
    if match is None or (Path(name).suffix in SUFFIXES and name.count("/") < 2):
        raise InputError(f"{name}: no such file; give one, or owner/name/file@revision on the hub")
    repo, file = match["repo"], match["file"] or HUB_FILES.get(match["repo"])
    revision = match["revision"] or revision
    try:
        from huggingface_hub import HfApi, hf_hub_download

        info = HfApi().model_info(repo, revision=revision)
        files = [item.rfilename for item in info.siblings or () if Path(item.rfilename).suffix in SUFFIXES]
        if file is None and len(files) == 1:
            file = files[0]
        if file is None or file not in files:
            raise InputError(
                f"{repo} holds {', '.join(files[:8]) or 'no weights'}: name one of them, {repo}/FILE[@revision]"
            )
        local = hf_hub_download(repo, file, revision=info.sha)  # the commit itself, not what a branch becomes
    except InputError:
        raise
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{name}: no such file, and not on the hub ({line}): check the spelling") from error
    return Path(local), WeightsOrigin(f"{repo}/{file}", info.sha)
