r"""A text-to-image (or video) pipeline of diffusers that steers.

    pipe = mfm.from_diffusers(StableDiffusion3Pipeline.from_pretrained(…), dtype=torch.bfloat16, device="cuda")
    pipe(["a red fox", "a lighthouse"]).images                          # what the pipeline itself would make
    pipe.steer("a red fox", reward, mfm.DPS()).images                   # towards a reward on pictures in [−1, 1]
    pipe.steer("a red fox", reward, mfm.Glass(num_draws=4), mfm.ODE(steps=28), num_images_per_prompt=4)

How a value walks, for ``steer(prompts, …)``:

    prompts       → Family.encode → Request: tensors with a row a prompt, size, options       (no gradient, once)
    Request       → Family.set_timesteps → FollowedSchedule: our times, the scheduler's clocks
    both          → PromptedModel, which mfm.steer takes: drift(t, x, {"prompt": number of each row's prompt})
    drift(t, x)   → FollowedSchedule.see: y, clock → Family.evaluate (network) → Family.guide → FollowedSchedule.drift
    reward        → Decoded(reward, LatentDecoder): Family.unpack, the autoencoder's scaling, its decoder
    samples       → LatentDecoder → the pipeline's image processor → .images

A state is what the pipeline itself calls ``latents``, packed where it packs. Without a process the pipeline's own
scheduler makes the steps (:class:`.scheduler_steps.SchedulerSteps`), so an unsteered sample is the pipeline's own;
``mfm.ODE(steps=28)`` takes the scheduler's times and Euler's steps, and any ``grid`` that is given goes first.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.cost import Extent, extrapolated
from metaflowmaps.errors import InputError, warn_caller
from metaflowmaps.interop.autoencoder import Decoded
from metaflowmaps.interop.diffusers.family import Family, Size
from metaflowmaps.interop.diffusers.latent_decoder import LatentDecoder
from metaflowmaps.interop.diffusers.schedule import FollowedSchedule, steps_alone
from metaflowmaps.prompted.adapters import load_adapter
from metaflowmaps.prompted.call import Asked, Settings, Texts, ask, event_shape, setting, size_of
from metaflowmaps.prompted.prompted_output import PromptedOutput
from metaflowmaps.prompted.scheduler_steps import SchedulerSteps
from metaflowmaps.random import Seed, as_seeds, fresh_seeds
from metaflowmaps.rewards.base import no_reward
from metaflowmaps.rewards.micro import MicroBatched
from metaflowmaps.steering import ODE, Method, Process, SteerResult, Unsteered, steer
from metaflowmaps.steering.diagnostics import without_pilot_pool
from metaflowmaps.steering.presets import USUAL
from metaflowmaps.work.choices import built

HOOKS = ("generator", "latents", "callback_on_step_end")
OUTPUTS = ("pil", "np", "pt", "latent")


class PromptedPipeline:
    """A diffusers pipeline with steering; :func:`metaflowmaps.from_diffusers` makes it.

    Args:
        family: of the pipeline, holding it.
        quick_vae: another autoencoder for the same latents, such as ``AutoencoderTiny``: rewards on the way are judged
            by its pictures, the finished samples by the pipeline's own.
        settings: how it computes.
    """

    def __init__(self, family: Family, quick_vae: Any = None, settings: Settings | None = None) -> None:
        self.family, self.quick_vae = family, quick_vae
        self.settings = settings or Settings()
        for network in family.networks:
            network.eval()
            if self.settings.checkpointing and getattr(network, "_supports_gradient_checkpointing", False):
                network.enable_gradient_checkpointing()
        self.followed = steps_alone(self.pipe.scheduler, setting(family, 3, event_shape(family, size_of(family))))
        if not self.followed:
            warn_caller(
                f"{type(self.pipe.scheduler).__name__} draws noise of its own: its times are taken, and Euler's steps"
            )

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline."""
        return self.family.pipe

    def to(self, *args: Any, **kwargs: Any) -> "PromptedPipeline":
        """As of the pipeline: a device, a dtype."""
        self.pipe.to(*args, **kwargs)
        return self

    # -- what it does ------------------------------------------------------------------------------------------------

    def __call__(self, prompt: Texts = None, **call: Any) -> PromptedOutput:
        """Samples of the pipeline, unsteered; all of :meth:`steer`'s arguments but the reward and the method."""
        return self.steer(prompt, None, Unsteered(), **call)

    def steer(
        self,
        prompt: Texts = None,
        reward: Callable[..., Tensor] | None = None,
        method: Method | str | None = None,
        process: Process | str | None = None,
        *,
        seed: Seed = None,
        output_type: str = "pil",
        **call: Any,
    ) -> PromptedOutput:
        """Sample towards e^r for each prompt, r a reward on pictures (B, 3, H, W), or videos (B, 3, F, H, W).

        Args:
            prompt: one text, several, or None where embeddings are given in ``call``.
            reward: of pictures in [−1, 1].
            method: as for ``mfm.steer``.
            process: as for ``mfm.steer``; None: the scheduler's own steps, or what the method needs.
            seed: as for ``mfm.steer``.
            output_type: "pil", "np", "pt" or "latent".
            call: as diffusers has them: ``negative_prompt``, embeddings by their names, ``num_inference_steps``,
                ``num_images_per_prompt``, ``height``, ``width``, ``num_frames``, ``generator``, ``latents``,
                ``callback_on_step_end``, and the family's own options such as ``guidance_scale``; and
                ``guidance_until``, the last time (data at 1) at which guidance acts.

        Returns:
            What was made, a sample a row, the images of a prompt side by side.
        """
        if output_type not in OUTPUTS:
            raise InputError(f"output_type is one of {', '.join(OUTPUTS)}, got {output_type!r}")
        chosen = built(Method, USUAL.method if method is None else method)
        if reward is None and not isinstance(chosen, Unsteered):
            raise InputError("steer needs a reward: a function of pictures, or one of mfm.rewards, such as PickScore")
        if chosen.gradients and any(hasattr(network, "_hf_hook") for network in self.family.networks):
            raise InputError(
                f"{chosen.name} takes gradients through an offloaded network: keep it on the device, or use a method "
                "without gradients, such as mfm.Glass() or mfm.BestOfN()"
            )
        hooks = {name: call.pop(name, None) for name in HOOKS}
        asked = ask(self.family, self.settings, prompt, self._steps(process, call), call)
        moves = self._process(chosen, process, asked.schedule)
        try:
            result = self._steered(asked, reward, chosen, moves, self._seeds(asked, chosen, seed, hooks), hooks)
            return self._output(asked, reward, result, output_type)
        finally:
            self.pipe.maybe_free_model_hooks()  # of an offloaded pipeline

    def estimate(
        self,
        prompt: Texts = None,
        reward: Callable[..., Tensor] | None = None,
        method: Method | str | None = None,
        process: Process | str | None = None,
        *,
        num_images_per_prompt: int = 1,
        **call: Any,
    ) -> dict[str, float]:
        """What a call costs before it is made: counts, seconds and memory, from short trials of a batch.

        Args:
            prompt: as for :meth:`steer`.
            reward: as for :meth:`steer`; None with a plain call.
            method: as for :meth:`steer`; None without a reward: a plain call.
            process: as for :meth:`steer`.
            num_images_per_prompt: as for :meth:`steer`.
            call: as for :meth:`steer`.

        Returns:
            The cost as results have it.
        """
        plain = Unsteered() if reward is None and method is None else method
        chosen = built(Method, USUAL.method if plain is None else plain)
        moves = None if process is None else built(Process, process)
        steps = self._steps(process, call)
        call = {name: value for name, value in call.items() if name not in ("seed", "output_type", *HOOKS)}
        prompts = 1 if isinstance(prompt, str) else len(prompt or _embedded(call))
        system, batch_size = chosen.system or num_images_per_prompt, self.settings.batch_size
        each = min(num_images_per_prompt, max(system, batch_size // prompts // system * system, 1))
        quiet = copy.copy(self)
        quiet.settings = replace(self.settings, progress=False)

        def trial(k: int) -> dict[str, float]:
            here = None if moves is None else replace(moves, steps=k)
            fixed = {"num_inference_steps": k, "num_images_per_prompt": each, "output_type": "latent"}
            with warnings.catch_warnings():  # of so few steps the cost alone is looked at
                warnings.simplefilter("ignore", UserWarning)
                return quiet.steer(prompt, reward, chosen, here, **call | fixed).cost

        return extrapolated(trial, steps, Extent(prompts * num_images_per_prompt, prompts * each, batch_size))

    # -- adapters ----------------------------------------------------------------------------------------------------

    def load_lora_weights(self, source: Any, **options: Any) -> "PromptedPipeline":
        """As of the pipeline, but a LoRA of another base is refused.

        Args:
            source: a folder, a file, a hub id or a dictionary of tensors.
            options: those of diffusers, such as ``adapter_name``.
        """
        load_adapter(self.family, source, **options)
        return self

    def finetune(
        self,
        prompt: Texts,
        reward: Callable[..., Tensor],
        out: str | PathLike[str],
        call: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Path:
        """Put the tilt e^r into a LoRA of the network, by values of the reward alone; the pipeline keeps it.

        Interrupted, the same call goes on from ``out``.

        Args:
            prompt: as for :meth:`steer`; rows of a step have one of them each.
            reward: of pictures in [−1, 1], λr.
            out: the directory of the run.
            call: what :meth:`steer` takes of the pipeline: embeddings, size, ``guidance_scale`` and other options.
            settings: of the run: ``method`` ("tilt-matching" or "ram", or one with its options), ``rank``, ``targets``,
                ``steps``, ``batch_size``, ``micro_batches``, ``optimizer``, ``seed``, ``chunk``, …

        Returns:
            The file of weights, which diffusers' ``load_lora_weights`` takes; a model card lies beside it.
        """
        from metaflowmaps.prompted.tuning import configured, tune_adapter  # which brings training

        options = dict(call or {})
        asked = ask(self.family, self.settings, prompt, self._steps(None, options), options)
        config = configured(asked.model, reward, settings)
        return tune_adapter(asked.model, self._reward(asked, reward), Path(out), config)

    # -- steering ----------------------------------------------------------------------------------------------------

    def _steps(self, process: Process | str | None, call: dict[str, Any]) -> int:
        """As the call says (which is taken out of it), or the process with its options, or the family."""
        usual = process.steps if isinstance(process, Process) else self.family.defaults["num_inference_steps"]
        steps: int = call.pop("num_inference_steps", usual)
        return steps

    def _process(self, method: Method, process: Process | str | None, schedule: FollowedSchedule) -> Process:
        """On the scheduler's times, unless a grid is asked for."""
        times = schedule.grid.times
        if process is None:
            usual = method.usual(steps=len(times) - 1, grid=times)
            if self.followed and type(usual) is ODE:
                return SchedulerSteps(steps=len(times) - 1, grid=times, schedule=schedule)
            return usual
        moves = built(Process, process)
        return replace(moves, steps=len(times) - 1, grid=times) if moves.grid is None else moves

    def _seeds(self, asked: Asked, method: Method, seed: Seed, hooks: Mapping[str, Any]) -> Seed:
        """Seeds of the samples; noise that is given, or drawn as the pipeline draws it, is remembered by its seed."""
        generator, latents, count = hooks["generator"], hooks["latents"], len(asked.prompts)
        if generator is not None and seed is not None:
            raise InputError("give seed= (of this package) or generator= (for the noise of diffusers), not both")
        first = generator[0] if isinstance(generator, list | tuple) else generator
        if generator is None and latents is None:
            return seed
        if method.system != 1:
            if latents is not None:
                raise InputError(f"{method.name} returns systems of particles, which share a seed: leave latents out")
            return int(fresh_seeds(1, first))
        if latents is None:
            latents = self.family.noise(count, asked.model.request.size, generator)
        noise = self.family.state(latents)
        if tuple(noise.shape) != (count, *asked.model.event_shape):
            raise InputError(
                f"latents must be {(count, *asked.model.event_shape)} for these prompts, got {tuple(noise.shape)}"
            )
        seeds = fresh_seeds(count, first) if seed is None else as_seeds(seed, count, "steer")
        asked.model.given = (seeds.cpu(), noise.detach().to(torch.float32))
        return seeds

    def _decoder(self, size: Size, vae: Any = None) -> LatentDecoder:
        many, again = self.settings.decoded_at_a_time, self.settings.checkpointing
        return LatentDecoder(self.family, size, vae, micro_batch=many, checkpointing=again)

    def _reward(self, asked: Asked, reward: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
        """Of states, through the quick decoder where there is one."""
        if reward is None:
            return no_reward
        if getattr(self.pipe, "vae", None) is None:
            raise InputError("without its vae this pipeline would give the reward latents, not pictures: load it too")
        return Decoded(reward, self._decoder(asked.model.request.size, self.quick_vae))  # type: ignore[arg-type]

    def _steered(
        self,
        asked: Asked,
        reward: Callable[..., Tensor] | None,
        method: Method,
        process: Process,
        seed: Seed,
        hooks: Mapping[str, Any],
    ) -> SteerResult:
        system, size = method.system, self.settings.batch_size
        if system != 1 and len(asked.prompts.unique()) > 1:  # particles of a system have one prompt: one system a batch
            size = system or asked.each
        prompts = asked.prompts.to(self.family.device)
        callback = self._callback(hooks["callback_on_step_end"], asked)
        with without_pilot_pool():
            return steer(
                asked.model,
                self._reward(asked, reward),
                len(prompts),
                method,
                process,
                cond={"prompt": prompts},
                seed=seed,
                batch_size=size,
                callback=callback,
                progress=self.settings.progress,
            )

    def _callback(self, given: Any, asked: Asked) -> Callable[[Any], bool] | None:
        """diffusers' callback(pipe, step, timestep, {"latents": …}); latents that it returns replace the states."""
        if given is None:
            return None
        clocks = asked.schedule.grid.clocks

        def told(step: Any) -> bool:
            latents = step.state.x
            timestep = clocks[min(step.step, len(clocks) - 1)]
            answer = given(self.pipe, step.step, timestep, {"latents": latents}) or {}
            if answer.get("latents", latents) is not latents:
                latents.copy_(answer["latents"])
            return bool(getattr(self.pipe, "_interrupt", False))

        self.pipe._interrupt = False
        return told

    # -- from states to pictures -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _output(
        self, asked: Asked, reward: Callable[..., Tensor] | None, result: SteerResult, output_type: str
    ) -> PromptedOutput:
        latents, prompts = result.samples, asked.prompts[: len(result.samples)]
        rewards, images = None if reward is None else result.rewards, latents
        judged_again = reward is not None and self.quick_vae is not None
        if len(latents) and (judged_again or output_type != "latent"):
            pictures = self._decoder(asked.model.request.size).decode(latents)
            if reward is not None and judged_again:
                in_parts = MicroBatched(reward, self.settings.decoded_at_a_time)
                rewards = in_parts(pictures, {"prompt": prompts.to(latents.device)})
            images = latents if output_type == "latent" else self._processed(pictures, output_type)
        rest = (rewards, result.info, result.interrupted)
        return PromptedOutput(images, latents, prompts, result.seeds, result.cost, *rest)

    def _processed(self, pictures: Tensor, output_type: str) -> Any:
        if self.family.video:
            return self.pipe.video_processor.postprocess_video(pictures, output_type=output_type)
        return self.pipe.image_processor.postprocess(pictures, output_type=output_type)


def _embedded(call: Mapping[str, Any]) -> Any:
    """The first of the embeddings that a call gives."""
    return next((value for name, value in call.items() if name.endswith("_embeds")), [""])
