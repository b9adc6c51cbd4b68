"""A checkpoint that is open: its map, what is known of where it came from, and the law or the data of its training."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from metaflowmaps.checkpoint import Checkpoint, resolve_checkpoint
from metaflowmaps.data import DataSource, read_examples, read_source
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.tuning_config import tuned_parts
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.interop.foreign import ForeignModel
from metaflowmaps.interop.opening import codec_of, is_latent, names_of, stored
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.networks import read_network
from metaflowmaps.networks.flops import forward_flops
from metaflowmaps.training.distillation import in_memory
from metaflowmaps.training.parents import open_parent
from metaflowmaps.work.devices import pick_device


@dataclass(frozen=True)
class OpenedModel:
    """A map with the checkpoint that it was read from, and what the user calls it."""

    name: str
    model: MetaFlowMap
    checkpoint: Checkpoint

    @classmethod
    def open(cls, name: str, device: str = "auto", needs_map: bool = True) -> "OpenedModel":
        """Read a checkpoint on to a device; a map of which only the drift was tuned has no draws.

        Args:
            name: a run, a checkpoint, a hub id or the name of a shipped model.
            device: auto, cpu, cuda or one of several GPUs.
            needs_map: whether draws are wanted of it.
        """
        if is_own(name):
            raise InputError(
                f"{name} is no checkpoint: mfm distill {name} --data DIR makes one (mfm eval posterior and mfm eval "
                "value take the network itself, and judge it by a law)"
            )
        target, checkpoint = pick_device(device), resolve_checkpoint(name)
        if needs_map and checkpoint.tuned and not tuned_parts(checkpoint.config["training"])["map"]:
            raise InputError(
                f"only the drift of {name} was tuned, its map belongs to no model: sample it with --method ode, "
                "steer it with none, dps or tds, or tune again with --map distil"
            )
        return cls(name, MetaFlowMap.from_pretrained(name).to(target), checkpoint)

    @property
    def device(self) -> torch.device:
        """Where the map is."""
        return self.model.device

    @property
    def digest(self) -> str:
        """What identifies the checkpoint."""
        return self.checkpoint.digest

    @property
    def is_planar(self) -> bool:
        """Whether samples are points of the plane, to be shown as such."""
        return self.model.event_shape == (2,)

    @property
    def is_pictorial(self) -> bool:
        """Whether samples are pictures, or latents of such."""
        return len(self.model.event_shape) == 3

    @property
    def latent(self) -> bool:
        """Whether samples are latents, to be decoded."""
        return is_latent(self.model) or "vae" in self.stored

    @property
    def stored(self) -> dict[str, Any]:
        """pipeline.json, where the checkpoint has one."""
        return stored(self.checkpoint)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of its classes."""
        return names_of(self.model, self.checkpoint)

    @property
    def data(self) -> DataSource | None:
        """The images or latents that it was trained on by this package."""
        return images_of(self.checkpoint)

    @property
    def law(self) -> GaussianMixture | None:
        """The mixture that it was trained on, or tuned to."""
        source = read_source(self.checkpoint.config.get("training", {}))
        return None if source is None else source.law()

    def cost_of(self, calls: float) -> dict[str, float]:
        """What so many evaluations of the network take."""
        parameters, flops = sum(p.numel() for p in self.model.parameters()), forward_flops(self.model.network)
        sizes = {"parameters": parameters, "memory_bytes": 4 * parameters}
        return {**sizes, "calls": calls, "gflops_per_call": flops / 1e9, "pflops": calls * flops / 1e15}

    def codec(self, vae: str | None = None) -> Any:
        """The autoencoder of its latents, as told or as it is stored; None for pixels."""
        codec = codec_of(self.model, self.checkpoint, vae)
        return None if codec is None else codec.to(self.device)

    def judging_law(self, source: DataSource, option: str) -> GaussianMixture:
        """The law to judge it by: that of an option, refused if it was trained on another; a tuned one's own."""
        if self.checkpoint.tuned:
            if self.law is None:
                raise InputError(
                    f"{self.name} was tuned to a reward whose tilted law nobody knows: nothing to hold it to"
                )
            return self.law
        if self.law is not None and read_source(self.checkpoint.config["training"]) != source:
            raise InputError(f"{self.name} was trained on another law than that of {option}: judge it with its own")
        law = source.law()
        if law is None:
            raise InputError(f"{option} knows no law: give one that does")
        return law

    def beside(self, name: str) -> Path:
        """Where results on it go: into the run that made it; for one from elsewhere, under runs/."""
        run = self.checkpoint.run
        return run / name if run is not None else Path("runs") / f"{Path(self.name).name}-{name}"


@dataclass(frozen=True)
class OpenedNetwork:
    """What ``file.py:make`` makes, such as ``mfm.wrap(network, …)``: a model without a checkpoint, a law or data."""

    name: str
    model: Any
    digest: str

    @classmethod
    def open(cls, name: str, device: str = "auto") -> "OpenedNetwork":
        """Make it, on a device.

        Args:
            name: ``file.py:make``.
            device: auto, cpu, cuda or one of several GPUs.
        """
        model, file = open_parent(name), Path(name.rpartition(":")[0]).expanduser()
        if not isinstance(model, ForeignModel):
            raise InputError(
                f"{name} makes a {type(model).__name__}: return mfm.wrap(network, …), or give a checkpoint"
            )
        code = file.read_bytes() if file.is_file() else b""
        digest = sha256(f"{name} {in_memory(model)} ".encode() + code).hexdigest()
        return cls(name, model.to(pick_device(device)), digest)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return torch.device(self.model.device)

    def cost_of(self, calls: float) -> dict[str, float]:
        """What so many evaluations of the network take."""
        return {"parameters": sum(p.numel() for p in self.model.parameters()), "calls": calls}

    def judging_law(self, source: DataSource, option: str) -> GaussianMixture:
        """The law of an option: the user says that the network was trained on it."""
        law = source.law()
        if law is None:
            raise InputError(f"{option} knows no law: give one that does")
        return law

    def beside(self, name: str) -> Path:
        """Where results on it go."""
        return Path("runs") / f"{self.name.rpartition(':')[2]}-{name}"


def is_own(name: str) -> bool:
    """Is this ``file.py:make``, a user's own network, and no checkpoint?"""
    return ":" in name and not Path(name).expanduser().exists()


def opened(name: str, device: str = "auto") -> OpenedModel | OpenedNetwork:
    """A checkpoint, or a user's own network."""
    return OpenedNetwork.open(name, device) if is_own(name) else OpenedModel.open(name, device)


def images_of(checkpoint: Checkpoint) -> DataSource | None:
    """The images or latents that a checkpoint was trained on by this package; None for vectors."""
    if len(read_network(checkpoint.config["network"])[1]) != 3:
        return None
    source = read_examples(checkpoint.training)
    return None if source is None or source.observed else source
