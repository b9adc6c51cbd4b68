r"""Low-rank adapters (LoRA) of a pipeline's network, by peft: loaded as diffusers loads them, trained, saved.

A linear layer W becomes ``W + B A``, A (r, in) random and B (out, r) zero, on the attention's projections unless other
modules are named. What is saved is ``pytorch_lora_weights.safetensors``, which diffusers' ``load_lora_weights`` reads.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError
from metaflowmaps.interop.diffusers import Family
from metaflowmaps.random import stream

NAME = "mfm"  # of the adapter that is trained
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # what every family of diffusers calls its projections
WEIGHTS = "pytorch_lora_weights.safetensors"


def load_adapter(family: Family, source: Any, **options: Any) -> None:
    """Load a LoRA as diffusers does; one that is not wholly the network's is refused, and nothing of it stays.

    Args:
        family: of the pipeline.
        source: a folder, a file, a hub id or a dictionary of tensors, as ``load_lora_weights`` takes them.
        options: of ``load_lora_weights``, such as ``adapter_name``.
    """
    _peft()
    pipe, network = family.pipe, family.networks[0]
    held = set(getattr(network, "peft_config", {}))
    said = source if isinstance(source, str | Path) else "these weights"
    try:
        given = _read(pipe, source, options)
        pipe.load_lora_weights(source, **options)
        new = set(getattr(network, "peft_config", {})) - held
        fits = len(new) == 1 and len(_weights(network, next(iter(new)))) == _count(given, family.network)
    except OSError as error:
        raise InputError(f"{said} holds no LoRA: give the folder of {WEIGHTS}, the file or a hub id") from error
    except (RuntimeError, ValueError, KeyError) as error:
        _forget(pipe, network, held)
        raise _misfit(said, network, " ".join(str(error).split())[:120]) from error
    if not fits:
        _forget(pipe, network, held)
        raise _misfit(said, network, "its weights are for other modules")


def _misfit(said: object, network: nn.Module, why: str) -> InputError:
    return InputError(
        f"{said} is no LoRA of this {type(network).__name__} ({why}): give one that was trained on this base"
    )


def _read(pipe: Any, source: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a LoRA by the names that diffusers has for them."""
    taken = {name: value for name, value in options.items() if name != "adapter_name"}
    read = pipe.lora_state_dict(dict(source) if isinstance(source, dict) else source, **taken)
    return dict(read[0] if isinstance(read, tuple) else read)


def _count(given: dict[str, Tensor], part: str) -> int:
    """Of how many tensors the network's part consists."""
    own = [name for name in given if name.startswith(f"{part}.")]
    return sum("lora" in name and not name.endswith("alpha") for name in own)


def _forget(pipe: Any, network: Any, held: set[str]) -> None:
    """Take off what a failed load has put on."""
    for name in set(getattr(network, "peft_config", {})) - held:
        pipe.delete_adapters(name)


def _weights(network: nn.Module, name: str) -> dict[str, Tensor]:
    from peft.utils import get_peft_model_state_dict

    weights: dict[str, Tensor] = get_peft_model_state_dict(network, adapter_name=name)
    return weights


class Adapter:
    """A new LoRA on a pipeline's network, switched on: the network computes what it did until B moves.

    Args:
        family: of the pipeline.
        rank: of the factors.
        targets: names of linear layers, or of their ends.
        seed: of A.
    """

    def __init__(self, family: Family, rank: int, targets: Sequence[str], seed: int) -> None:
        peft = _peft()
        self.family = family
        self.network: Any = _tunable(family)
        settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):  # peft fills the factors from the global generator
            try:
                self.network.add_adapter(settings, adapter_name=NAME)
            except ValueError as error:
                raise InputError(
                    f"no linear layer of {type(self.network).__name__} is called {', '.join(targets)}: name some by "
                    "targets=…"
                ) from error
        generator = stream(seed, "low-rank")
        self.factors = {
            name: factor for name, factor in self.network.named_parameters() if f".{NAME}." in name and "lora_" in name
        }
        for name, factor in self.factors.items():
            first = "lora_A" in name
            drawn = torch.randn(factor.shape, generator=generator) / math.sqrt(factor[0].numel())
            factor.data = (drawn if first else torch.zeros(factor.shape)).to(factor.device)  # float32, in any network
            factor.requires_grad_(True)

    def save(self, folder: Path) -> None:
        """Write ``pytorch_lora_weights.safetensors`` for diffusers.

        Args:
            folder: where.
        """
        part = self.family.network
        weights = {name: value.detach().cpu() for name, value in _weights(self.network, NAME).items()}
        about = {f"{part}_lora_adapter_metadata": self.network.peft_config[NAME].to_dict()}
        type(self.family.pipe).save_lora_weights(folder, **{f"{part}_lora_layers": weights}, **about)

    def take_off(self) -> None:
        """The network without it."""
        self.network.delete_adapters(NAME)


def _tunable(family: Family) -> Any:
    """The one network of a family, without adapters."""
    kind = type(family.pipe).__name__
    if not hasattr(family.pipe, "save_lora_weights"):
        raise InputError(f"{kind} saves no LoRA: fine-tune a pipeline of diffusers that does")
    if len(family.networks) != 1:
        raise InputError(f"this {kind} has {len(family.networks)} networks, and a LoRA is tuned on one: give another")
    network: Any = family.networks[0]
    held = set(getattr(network, "peft_config", {}))
    if NAME in held:  # of an earlier run
        network.delete_adapters(NAME)
    if held - {NAME}:
        raise InputError("this pipeline has an adapter already: fuse it first, pipe.pipe.fuse_lora() and "
                         "pipe.pipe.unload_lora_weights()")  # fmt: skip
    return network


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("adapters need peft: pip install 'metaflowmaps[lora]'") from None
    return peft
