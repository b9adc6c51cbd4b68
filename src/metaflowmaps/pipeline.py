r"""A map, its autoencoder and the names of its classes: pictures from one object.

    pipe = Pipeline.from_pretrained("runs/mfm-xl2")
    pipe("tabby cat", steps=4, guidance=2.5).images              # refinement: one network call a step
    pipe.posterior(picture, t=0.4, num_draws=4).images           # what a noised picture may have been
    pipe.steer("tabby cat", reward, mfm.MFMG()).images           # sampling towards a reward on pictures

It adds no method: labels become numbers, pictures become latents, and ``MetaFlowMap.generate``, ``MetaFlowMap.draw``
and ``steer`` do the rest. A reward on pictures is one on latents through the decoder, ``r(decode(z))``. Without an
autoencoder the map's samples are the pictures.

On disk it is a checkpoint with one document more, ``pipeline.json``: which autoencoder (a hub id, or a folder beside
it), the classes' names, the usual guidance.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaflowmaps import imagenet_names as imagenet
from metaflowmaps._shapes import Cond, check_count, check_time, select_cond
from metaflowmaps.checkpoint import save_model
from metaflowmaps.cost import Extent, Meter, extrapolated
from metaflowmaps.data.imaging import from_tensor, to_tensor
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.interop.autoencoder import AutoencoderCodec, Decoded
from metaflowmaps.interop.opening import DOCUMENT, codec_of, names_of, open_map, pipeline_document, stored
from metaflowmaps.networks.compiling import Compile, Precision, use_compiled
from metaflowmaps.networks.precision import hold_rounded
from metaflowmaps.random import Seed, as_seeds, randn
from metaflowmaps.steering import Method, Process, steer
from metaflowmaps.steering.presets import settled
from metaflowmaps.work.progress import Bar

Labels = str | int | Sequence[str | int] | Tensor | np.ndarray[Any, Any] | None
STEPS = 4  # of refinement
MADE_AT_A_TIME, STEERED_AT_A_TIME = 64, 8  # pictures


@dataclass(frozen=True)
class PipelineOutput:
    """What a call made; of posterior draws, (num_draws, n, …) instead of (n, …)."""

    pictures: Tensor  # (n, C, H, W) in [−1, 1]
    latents: Tensor  # (n, *event): the map's own samples
    labels: Tensor | None
    seeds: Tensor | None
    cost: dict[str, float]
    rewards: Tensor | None = None
    info: dict[str, Tensor] = field(default_factory=dict)
    interrupted: bool = False

    @cached_property
    def images(self) -> list[Any]:
        """PIL images: ``images[picture]``, of posterior draws ``images[draw][picture]``."""
        drawn = self.pictures.ndim == 5
        return [from_tensor(draw) for draw in self.pictures] if drawn else from_tensor(self.pictures)


class Pipeline:
    """A map with what turns its samples into pictures and its classes into names; the map is frozen as it is taken.

    Args:
        model: the map.
        codec: the autoencoder of its latents; None where samples are pictures.
        class_names: one a class, or none at all.
        guidance: the scale that is meant where a call does not say one.
        batch_size: pictures made at a time; None: 64, of steered ones 8.
        progress: whether calls show a bar.
        compile: the network by torch.compile: auto (on CUDA, where it computes what is written), true or false.

    Examples:
        >>> pipe = mfm.Pipeline(mfm.MetaFlowMap.from_pretrained("digits"), progress=False)
    """

    def __init__(
        self,
        model: MetaFlowMap,
        codec: AutoencoderCodec | None = None,
        class_names: Sequence[str] = (),
        guidance: float | None = None,
        *,
        batch_size: int | None = None,
        progress: bool = True,
        compile: Compile = "auto",
    ) -> None:
        self.model, self.codec = model.eval().requires_grad_(False), codec
        self.class_names = tuple(class_names)
        self.guidance, self.batch_size, self.progress = guidance, batch_size, progress
        self.precision, self.compile, self.halved = torch.float32, compile, False
        self._told: tuple[Any, str | None] = (None, None)
        if self.class_names and len(self.class_names) != self.num_classes:
            raise InputError(f"{len(self.class_names)} names for {self.num_classes} classes: give one a class")
        if codec is not None:
            codec.image_shape(model.event_shape)  # refused if these are not its latents

    # -- from and to disk --------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | FilePath,
        *,
        vae: str | FilePath | AutoencoderCodec | None = None,
        family: str = "auto",
        config: Mapping[str, Any] | None = None,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compile: Compile = "auto",
        **codec_options: Any,
    ) -> "Pipeline":
        """A checkpoint or run, a shipped model's name, a published SiT, DMF or MFM file, or any of them on the hub.

        ``vae`` is the autoencoder of latent models, where the checkpoint does not name one: ``sd-vae-ft-mse`` if left
        out. ``dtype``: float32, or bfloat16 for the networks alone (states stay float32). ``compile``: see the class.
        ``codec_options`` are micro_batch, tiling, slicing, checkpointing. ``family``, ``config``: as in
        ``mfm.pretrained.load``.
        """
        model, found = open_map(path_or_hub_id, family, config, revision)
        codec = codec_of(model, found, vae, **codec_options)
        guidance = stored(found).get("guidance")
        return cls(model, codec, names_of(model, found), guidance, compile=compile).to(device, dtype)

    def save_pretrained(self, path: str | FilePath, vae: str | None = None) -> None:
        """A checkpoint with ``pipeline.json``; ``vae`` names the autoencoder, None writes it beside the map."""
        if self.halved:
            raise InputError("halved weights are rounded: save the pipeline before halve(), or copy its checkpoint")
        place = None if self.codec is None else vae or "vae"
        document = pipeline_document(self.model, self.class_names, place, self.guidance)
        save_model(self.model, path, documents={DOCUMENT: document})
        if self.codec is not None and vae is None:
            self.codec.vae.save_pretrained(FilePath(path) / "vae")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Pipeline":
        """Move it, and set what the networks compute in: torch.float32 or torch.bfloat16."""
        if dtype is not None:
            if self.halved and dtype != torch.bfloat16:
                raise InputError(f"weights that were halved compute in torch.bfloat16, not {dtype}: open the map again")
            if dtype not in (torch.float32, torch.bfloat16):
                raise InputError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
            self.precision = dtype  # by autocast: weights stay as they are, and can be saved
        if device is not None:
            self.model.to(device)
            if self.codec is not None:
                self.codec.to(device)
        return self

    def halve(self) -> "Pipeline":
        """Compute in bfloat16, and hold in it the matrices that it rounds at every use: the same pictures, to the bit.

        For sampling and serving: the map cannot be saved from here on, nor compute in float32. Weights of a transformer
        take two thirds of their memory (what scales its tokens by the times stays float32); those of a ``unet``, whose
        convolutions normalise them at every use, as much as before.
        """
        if not self.halved:
            use_compiled(self.model.network, False, self.device)  # hooks see layers that are not compiled alone
            self._told = (None, None)
            state = torch.zeros((1, *self.model.event_shape), dtype=self.model.dtype, device=self.device)
            cond = self.condition(None, None, 1)
            hold_rounded(self.model.network, lambda: self.model.drift(0.5, state, cond), self.device, torch.bfloat16)
            self.precision, self.halved = torch.bfloat16, True
        return self

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Classes of the map; 0 for one without."""
        return int(getattr(self.model.network, "num_classes", 0))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.model.device

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of a picture."""
        return self.model.event_shape if self.codec is None else self.codec.image_shape(self.model.event_shape)

    def label(self, name: str | int) -> int:
        """The number of a class, by name, number or (ImageNet) WordNet id; a mistyped name suggests the nearest."""
        if not self.num_classes:
            raise InputError("this map knows no classes: leave the label out")
        if self.class_names == imagenet.class_names():
            return imagenet.class_index(name)
        return imagenet.class_index(name, self.class_names or tuple(map(str, range(self.num_classes))))

    # -- what it does ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        label: Labels = None,
        steps: int = STEPS,
        guidance: float | None = None,
        num_images: int = 1,
        *,
        seed: Seed = None,
    ) -> PipelineOutput:
        """``num_images`` pictures a label by K-step refinement (Alg. 1), K network calls each.

        ``label``: a class's name or number, several of them, or None for no class. A picture is a function of its seed
        (``result.seeds``), whatever the batch.
        """
        check_count(steps, "steps")
        labels, n = self.labels(label, num_images)
        cond, seeds = self.condition(labels, guidance, n), as_seeds(seed, n, "pictures")
        batch_size = self._batch_size(MADE_AT_A_TIME)
        made: list[Tensor] = []
        with self._metered() as meter, self.autocast(), Bar(n if self.progress else 0, "pictures") as bar:
            for begin in range(0, n, batch_size):
                part = slice(begin, min(begin + batch_size, n))
                here = select_cond(cond, part)
                made.append(self.model.generate(part.stop - begin, steps, cond=here, seeds=seeds[part]))
                bar.advance(len(made[-1]))
            latents = torch.cat(made)
            pictures = self.decode(latents)
        return PipelineOutput(pictures, latents, labels, seeds, meter.cost())

    @torch.no_grad()
    def posterior(
        self,
        image: Any,
        t: float,
        num_draws: int = 4,
        steps: int = 1,
        label: Labels = None,
        guidance: float | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> PipelineOutput:
        """Noise pictures to time t, then draw what they may have been: ``images[draw][picture]``.

        ``image``: one or several, of the pipeline's size. ``info["noisy"]`` is the state they are drawn for.
        """
        check_time(t)
        x_1, label = self.encode(image), _plain(label)
        labels, n = self.labels(label, 1 if isinstance(label, list) else len(x_1))
        if n != len(x_1):
            raise InputError(f"{n} labels for {len(x_1)} pictures: give one, or one a picture")
        x_t = self.model.path.interpolate(randn(tuple(x_1.shape), generator, x_1.dtype, x_1.device), x_1, t)
        with self._metered() as meter, self.autocast():
            latents = self.model.draw(t, x_t, num_draws, steps, generator, self.condition(labels, guidance, n))
            pictures = self.decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        return PipelineOutput(pictures, latents, labels, None, meter.cost(), info={"noisy": x_t})

    def steer(
        self,
        label: Labels = None,
        reward: Callable[..., Tensor] | None = None,
        method: Method | str | None = None,
        process: Process | str | None = None,
        num_images: int = 1,
        guidance: float | None = None,
        *,
        seed: Seed = None,
    ) -> PipelineOutput:
        """Sample towards e^r, r a reward on pictures (B, 3, H, W) in [−1, 1].

        ``method``, ``process`` and ``seed`` are those of ``mfm.steer``. Where memory runs out, a batch is halved and
        its samples made again from their seeds. Particles that are returned together are systems of ``batch_size`` at
        most.
        """
        if reward is None:
            raise InputError("steer needs a reward: a function of pictures, or one of mfm.rewards, such as PickScore")
        labels, n = self.labels(label, num_images)
        with self.autocast():
            made = steer(
                self.model,
                self.on_latents(reward),
                n,
                method,
                process,
                cond=self.condition(labels, guidance, n),
                seed=seed,
                batch_size=self._batch_size(STEERED_AT_A_TIME),
                progress=self.progress,
            )
            with torch.no_grad():
                pictures = self.decode(made.samples)
        labels = None if labels is None else labels[: len(pictures)]
        rest = (made.seeds, made.cost, made.rewards, made.info, made.interrupted)
        return PipelineOutput(pictures, made.samples, labels, *rest)

    def estimate(
        self,
        num_images: int = 1,
        reward: Callable[..., Tensor] | None = None,
        *,
        label: Labels = None,
        steps: int = STEPS,
        method: Method | str | None = None,
        process: Process | str | None = None,
        guidance: float | None = None,
    ) -> dict[str, float]:
        """What a call costs before it is made: calls, seconds, memory, from short trials of a single batch.

        With a ``reward``, of ``steer`` by ``method`` and ``process``; without, of a plain call with ``steps``. Counts
        grow by a constant a step and a sample: trials of two and of three steps tell it.
        """
        chosen, usual = settled(method, process)
        steps = steps if reward is None else usual.steps
        check_count(steps, "steps")
        each = self.labels(label, 1)[1]  # pictures of one count
        batch_size = self._batch_size(MADE_AT_A_TIME if reward is None else STEERED_AT_A_TIME)
        rows, system = min(num_images, max(1, batch_size // each)), 1 if reward is None else chosen.system or 1
        rows = min(num_images, max(system, rows // system * system))  # whole systems
        quiet = copy.copy(self)
        quiet.progress = False

        def trial(k: int) -> dict[str, float]:
            if reward is None:
                return quiet(label, k, guidance, rows, seed=0).cost
            with warnings.catch_warnings():  # of so few steps the cost alone is looked at
                warnings.simplefilter("ignore", UserWarning)
                return quiet.steer(label, reward, chosen, replace(usual, steps=k), rows, guidance, seed=0).cost

        return extrapolated(trial, steps, Extent(num_images * each, rows * each, batch_size))

    def _batch_size(self, usual: int) -> int:
        size = usual if self.batch_size is None else self.batch_size
        check_count(size, "batch_size")
        return size

    # -- between pictures and latents --------------------------------------------------------------------------------

    def encode(self, image: Any) -> Tensor:
        """Pictures of any kind -> the model's samples, (B, *event): the mean of their latents."""
        x = to_tensor(image, self.image_shape[0]).to(self.device, self.model.dtype)
        if tuple(x.shape[1:]) != tuple(self.image_shape):
            wanted = "×".join(map(str, self.image_shape[1:]))
            raise InputError(f"pictures must be {wanted} for this model, got {x.shape[2]}×{x.shape[3]}: resize them")
        return x if self.codec is None else self.codec.encode(x)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Samples -> pictures (B, C, H, W) in [−1, 1], differentiable."""
        return latents.clamp(-1, 1) if self.codec is None else self.codec.decode(latents)

    def on_latents(self, reward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The reward of a sample: that of its picture."""
        return reward if self.codec is None else Decoded(reward, self.codec)

    # -- conditions --------------------------------------------------------------------------------------------------

    def labels(self, label: Labels, repeats: int) -> tuple[Tensor | None, int]:
        """Numbers of the classes, each ``repeats`` times, and how many pictures that makes."""
        check_count(repeats, "num_images")
        if label is None:
            return None, repeats
        plain = _plain(label)
        names = plain if isinstance(plain, list) else [plain]
        if not names:
            raise InputError("no label was given: name a class, or leave the label out")
        numbers = torch.tensor([self.label(name) for name in names]).repeat_interleave(repeats)
        return numbers.to(self.device), len(numbers)

    def condition(self, labels: Tensor | None, guidance: float | None, n: int) -> Cond:
        """``cond`` of n samples: the null class where no label is given, the usual guidance where no scale is."""
        guided = (getattr(self.model.network, "guidance", None) or self.model.guidance_law) is not None
        scale = self.guidance if guidance is None else guidance
        if scale is not None and not guided:
            if guidance is None or guidance == 1:
                scale = None
            else:
                raise InputError(
                    "this map was not trained with guidance: leave it out, or train one with condition.guidance"
                )
        cond: dict[str, Tensor] = {}
        if labels is not None:
            cond["label"] = labels
        elif self.num_classes:
            cond["label"] = torch.full((n,), self.num_classes, device=self.device)
            scale = None if guidance is None else scale  # no class to guide towards
        if scale is not None:
            cond["guidance"] = torch.full((n,), float(scale), device=self.device)
        return cond or None

    def autocast(self) -> AbstractContextManager[Any]:
        """What the networks compute in, while it lasts; where they are to be compiled, they are from here on."""
        self.use_compiled()
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def use_compiled(self) -> str | None:
        """Compile the network where that is asked for, on this device and in this precision; what is worth telling."""
        wanted = (self.compile, self.device, self.precision)
        if self._told[0] != wanted:
            precision: Precision = "float32" if self.precision == torch.float32 else "bf16"
            self._told = (wanted, use_compiled(self.model.network, self.compile, self.device, precision))
        return self._told[1]

    def _metered(self) -> Meter:
        meter = Meter(self.model.network, self.device)
        if self.codec is not None:
            meter.watch(self.codec, "decodes", None)
        return meter


def _plain(label: Any) -> Any:
    """Labels of any kind as a name, a number or a list of these."""
    if isinstance(label, Tensor | np.ndarray | np.generic):
        label = label.tolist()
    if label is None or isinstance(label, str | int):
        return label
    names = list(label) if isinstance(label, Iterable) else [label]
    names = [name.item() if isinstance(name, np.generic | Tensor) and name.ndim == 0 else name for name in names]
    for name in names:
        if not isinstance(name, str | int):
            raise InputError(f"a label is a class's name or number, or a list of these; got {name!r}")
    return names
