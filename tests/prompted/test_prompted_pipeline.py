"""The conventions of diffusers, schedulers of every kind, texts, memory, and one line for bad input."""

import functools
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from benchmarks.tiny_pipelines import (
    FAMILIES,
    GUIDED,
    OTHER_TOKENS,
    PLAIN,
    TABLE,
    TOKENS,
    assemble,
    seeded,
    stable_diffusion,
    stable_diffusion_3,
)
from torch import Tensor

import metaflowmaps as mfm
from metaflowmaps.errors import InputError
from metaflowmaps.prompted import PromptedPipeline

OWN = 1e-5  # as tests/prompted/test_families.py derives it
# float32 on another batch size sums in another order, about 20 roundings of 6e-8 on values up to 5, then three steps
BATCH = 3e-5
FLUX = FAMILIES["FLUX.1"]


@functools.cache
def flux(**options: Any) -> PromptedPipeline:
    return mfm.from_diffusers(FLUX.make(), progress=False, **options)


def request(**options: Any) -> dict[str, Any]:
    return FLUX.embeds | FLUX.size | {"num_inference_steps": 3, "output_type": "latent"} | options


def brightness(pictures: Tensor) -> Tensor:
    return 20 * pictures.flatten(1).mean(1)


# -- schedulers --------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "DDIM to the end": diffusers.DDIMScheduler(**TABLE, clip_sample=False),
    "DDIM of v": diffusers.DDIMScheduler(**TABLE, clip_sample=False, prediction_type="v_prediction"),
    "DDIM, trailing": diffusers.DDIMScheduler(**TABLE, clip_sample=False, timestep_spacing="trailing"),
    "PNDM": diffusers.PNDMScheduler(**TABLE, skip_prk_steps=True),
    "Euler, leading": diffusers.EulerDiscreteScheduler(**TABLE, timestep_spacing="leading"),
    "Euler, linspace": diffusers.EulerDiscreteScheduler(**TABLE, timestep_spacing="linspace"),
    "Euler, Karras": diffusers.EulerDiscreteScheduler(**TABLE, use_karras_sigmas=True),
    "Heun": diffusers.HeunDiscreteScheduler(**TABLE),
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler(**TABLE),
    "UniPC": diffusers.UniPCMultistepScheduler(**TABLE),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedulers_own_steps_are_followed(name):
    pipe = seeded(lambda: stable_diffusion(SCHEDULERS[name]))()
    call = TOKENS | OTHER_TOKENS | GUIDED | {"height": 32, "width": 32, "num_inference_steps": 4}
    expected = pipe(**call, generator=torch.manual_seed(3), output_type="latent").images
    made = mfm.from_diffusers(pipe, progress=False)(**call, generator=torch.manual_seed(3), output_type="latent")
    atol = OWN * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(made.latents, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["DDIM to the end", "DDIM, trailing", "Euler, leading", "Euler, linspace"])
def test_euler_on_the_schedulers_times_is_ddim(name):
    pipe = seeded(lambda: stable_diffusion(SCHEDULERS[name]))()
    call = TOKENS | PLAIN | {"height": 32, "width": 32, "output_type": "latent"}
    expected = pipe(**call, num_inference_steps=4, generator=torch.manual_seed(3)).images
    made = mfm.from_diffusers(pipe, progress=False)(**call, process=mfm.ODE(steps=4), generator=torch.manual_seed(3))
    atol = OWN * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(made.latents, expected, rtol=0, atol=atol)


def test_a_scheduler_that_draws_lends_its_times_alone():
    pipe = seeded(lambda: stable_diffusion(diffusers.EulerAncestralDiscreteScheduler(**TABLE)))()
    with pytest.warns(UserWarning, match="draws noise of its own"):
        ours = mfm.from_diffusers(pipe, progress=False)
    call = TOKENS | PLAIN | {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "latent"}
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    expected = pipe(**call, generator=torch.manual_seed(3)).images
    made = ours(**call, generator=torch.manual_seed(3)).latents
    torch.testing.assert_close(made, expected, rtol=0, atol=OWN * float(expected.abs().max()))


# -- randomness, prompts and rows --------------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_its_seed():
    many = flux(batch_size=4)(**request(num_images_per_prompt=2, seed=7))
    alone = flux(batch_size=1)(**request(num_images_per_prompt=2, seed=many.seeds))
    torch.testing.assert_close(alone.latents, many.latents, rtol=0, atol=BATCH)
    assert many.prompts.tolist() == [0, 0, 1, 1]
    assert float((many.latents[0] - many.latents[1]).abs().max()) > 0.1


def test_rows_of_a_prompt_stand_side_by_side_as_in_diffusers():
    ours = mfm.from_diffusers(seeded(stable_diffusion)(), progress=False)
    call = TOKENS | PLAIN | {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
    call |= {"num_images_per_prompt": 2}
    expected = ours.pipe(**call, generator=torch.manual_seed(3)).images
    atol = OWN * float(expected.abs().max())
    torch.testing.assert_close(ours(**call, generator=torch.manual_seed(3)).latents, expected, rtol=0, atol=atol)
    noise = torch.randn(4, 4, 8, 8, generator=torch.manual_seed(3))
    torch.testing.assert_close(ours(**call, latents=noise).latents, expected, rtol=0, atol=atol)


class Words:
    """A tokenizer: the letters of a text."""

    model_max_length, added_tokens_encoder = 8, {}

    def __call__(self, texts: Any, **options: Any) -> Any:
        rows = [
            [ord(letter) % 30 for letter in text.ljust(8)[:8]]
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        return SimpleNamespace(input_ids=torch.tensor(rows), attention_mask=torch.ones(len(rows), 8))

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [""] * len(ids)


def test_texts_go_through_the_pipelines_own_encoder():
    pipe = seeded(stable_diffusion)()
    config = transformers.CLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipe.text_encoder = transformers.CLIPTextModel(config).eval()
    pipe.tokenizer = Words()
    call = GUIDED | {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
    texts = {"prompt": ["fox", "lighthouse"], "negative_prompt": ["dull", "dark"]}
    ours = mfm.from_diffusers(pipe, progress=False)
    expected = pipe(**texts, **call, generator=torch.manual_seed(3)).images
    made = ours(**texts, **call, generator=torch.manual_seed(3)).latents
    torch.testing.assert_close(made, expected, rtol=0, atol=OWN * float(expected.abs().max()))
    one = ours("fox", negative_prompt="dull", **call, generator=torch.manual_seed(3)).latents
    assert float((one[0] - ours("fox", **call, generator=torch.manual_seed(3)).latents[0]).abs().max()) > 1e-4


def test_guidance_ends_where_it_is_told():
    guided = FLUX.negative | FLUX.calls["guided"] | {"seed": 1}
    plain, whole = (flux()(**request(**guided | {"guidance_until": until})) for until in (0.0, 1.0))
    first = 2 * 3 + 2  # one step of two prompts is guided: t = 0
    assert (plain.cost["forwards"], whole.cost["forwards"]) == (first, 2 * 2 * 3)


# -- conventions -------------------------------------------------------------------------------------------------------


def test_the_callback_sees_every_step_and_may_replace_latents():
    seen = []

    def told(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((pipe is flux().pipe, step, float(timestep)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 2 else kwargs

    made = flux()(**request(seed=1), callback_on_step_end=told)
    assert [step for _, step, _ in seen] == [0, 1, 2]
    assert all(own for own, _, _ in seen)
    assert [clock for _, _, clock in seen] == sorted((clock for _, _, clock in seen), reverse=True)
    assert not made.latents.any()

    def stopped(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = True
        return kwargs

    assert flux()(**request(seed=1), callback_on_step_end=stopped).interrupted


def test_images_come_as_asked():
    call = request(seed=1)
    pictures = flux()(**call | {"output_type": "pil"}).images
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    assert flux()(**call | {"output_type": "np"}).images.shape == (2, 32, 32, 3)
    assert flux()(**call | {"output_type": "pt"}).images.shape == (2, 3, 32, 32)


def test_memory_options_change_no_sample():
    call = request(num_images_per_prompt=2, seed=3)
    made = flux(batch_size=4).steer(reward=brightness, method=mfm.DPS(), **call)
    frugal = flux(batch_size=4, micro_batch=1, decoded_at_a_time=3)
    small = frugal.steer(reward=brightness, method=mfm.DPS(), **call)
    torch.testing.assert_close(small.latents, made.latents, rtol=0, atol=BATCH)
    remembered = flux(batch_size=4, checkpointing=False).steer(reward=brightness, method=mfm.DPS(), **call)
    torch.testing.assert_close(remembered.latents, made.latents, rtol=0, atol=BATCH)


def test_a_quick_decoder_judges_the_way_and_the_full_one_the_end():
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    quick = mfm.from_diffusers(FLUX.make(), quick_vae=tiny, progress=False)
    decoded = []
    quick.pipe.vae.register_forward_hook(lambda *_: decoded.append("full"))
    tiny.decoder.register_forward_hook(lambda *_: decoded.append("quick"))
    made = quick.steer(reward=brightness, method=mfm.DPS(), **request(seed=1) | {"output_type": "pt"})
    assert decoded.count("quick") >= 3 * 2
    torch.testing.assert_close(made.rewards, brightness(2 * made.images - 1), rtol=0, atol=20 * 2 * BATCH)


def test_an_estimate_counts_what_the_call_will_cost():
    call = FLUX.embeds | FLUX.size | {"num_images_per_prompt": 2}
    guessed = flux().estimate(reward=brightness, method=mfm.DPS(), num_inference_steps=5, **call)
    made = flux().steer(reward=brightness, method=mfm.DPS(), num_inference_steps=5, output_type="latent", **call)
    for key in ("forwards", "backwards", "decodes", "reward_calls"):
        assert guessed[key] == made.cost[key]


def test_a_process_by_name_has_the_familys_steps(monkeypatch):
    monkeypatch.setitem(flux().family.defaults, "num_inference_steps", 4)
    call = FLUX.embeds | FLUX.size | {"process": "ode", "output_type": "latent"}
    assert flux().estimate(**call)["forwards"] == flux()(**call).cost["forwards"] == 4 * 2


# -- bad input ---------------------------------------------------------------------------------------------------------


BAD = {
    "no reward": (lambda: flux().steer(method=mfm.DPS(), **request()), "steer needs a reward"),
    "nothing": (lambda: flux()(num_inference_steps=2), "either prompts or embeddings"),
    "both": (lambda: flux()("fox", **request()), "either prompts or embeddings"),
    "an option": (lambda: flux()(**request(guidance_scal=2.0)), "did you mean 'guidance_scale'"),
    "a size": (lambda: flux()(**request() | {"height": 30}), "height must be a multiple of 8"),
    "frames": (lambda: flux()(**request(num_frames=5)), "leave num_frames out"),
    "rows": (
        lambda: flux()(**request(pooled_prompt_embeds=torch.zeros(3, 12))),
        "one row a prompt each",
    ),
    "latents": (lambda: flux()(**request(latents=torch.zeros(2, 4, 8, 8))), r"latents must be \(2, 16, 16\)"),
    "two seeds": (lambda: flux()(**request(seed=1, generator=torch.manual_seed(0))), "not both"),
    "an output": (lambda: flux()(**request() | {"output_type": "jpg"}), "output_type is one of"),
    "no tensors": (lambda: flux()(**request(prompt_embeds="fox")), "embeddings are tensors"),
    "a setting": (lambda: mfm.from_diffusers(FLUX.make(), micro_bach=1), "did you mean 'micro_batch'"),
    "no rows": (lambda: mfm.from_diffusers(FLUX.make(), batch_size=0), "batch_size must be at least 1"),
    "a network": (lambda: mfm.from_diffusers(FLUX.make().transformer), "a network alone is wrapped by mfm.wrap"),
    "no such folder": (lambda: mfm.from_diffusers("/no/such/folder"), "cannot be loaded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(name):
    call, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_page_runs_without_weights():
    page = (Path(__file__).parents[2] / "docs" / "text-to-image.md").read_text()
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "tiny_pipelines" in code)
    names: dict[str, Any] = {}
    exec(compile(block, "text-to-image.md", "exec"), names)
    assert len(names["made"].images) == 2


def test_a_pipeline_that_lacks_a_package_names_what_brings_it(monkeypatch):
    def lacking(*_: Any, **__: Any) -> Any:
        raise ImportError("SanaPipeline requires the transformers library")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lacking)
    with pytest.raises(InputError, match=r"ImportError: .*pip install 'metaflowmaps\[latent,rewards\]'"):
        mfm.from_diffusers("a-lab/a-pipeline")


def test_guidance_without_negative_embeddings_is_refused():
    ours = mfm.from_diffusers(seeded(stable_diffusion_3)(), progress=False)
    with pytest.raises(InputError, match="negative_prompt_embeds"):
        ours(**FLUX.embeds, **GUIDED, num_inference_steps=2)
    ours.pipe.vae = None
    with pytest.raises(InputError, match="load it too"):
        ours.steer(reward=brightness, **FLUX.embeds, **PLAIN, num_inference_steps=2)


def test_gradients_through_an_offloaded_network_are_refused(monkeypatch):
    monkeypatch.setattr(flux().pipe.transformer, "_hf_hook", object(), raising=False)
    with pytest.raises(InputError, match="an offloaded network"):
        flux().steer(reward=brightness, method=mfm.DPS(), **request())


def test_unknown_pipelines_and_schedules_are_refused():
    unknown = assemble(
        diffusers.DDIMPipeline,
        unet=diffusers.UNet2DModel(
            8,
            3,
            3,
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        scheduler=diffusers.DDIMScheduler(),
    )
    with pytest.raises(InputError, match="DDIMPipeline is no pipeline that this package knows"):
        mfm.from_diffusers(unknown)
    split = seeded(stable_diffusion_3)()
    split.vae.to("meta")
    with pytest.raises(InputError, match="on several devices"):
        mfm.from_diffusers(split)
    pipe = seeded(stable_diffusion_3)()
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(InputError, match="neither a flow schedule"):
        mfm.from_diffusers(pipe)(**FLUX.embeds, **PLAIN)


def test_a_family_of_ones_own_is_used():
    from metaflowmaps.interop.diffusers.families.flux import Flux

    class Doubled(Flux):
        def guide(self, given, other, scale, request):
            return 2 * given

    ours = mfm.from_diffusers(FLUX.make(), family=Doubled, progress=False)
    call = request(**FLUX.negative, **FLUX.calls["guided"], seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float((ours(**call).latents - flux()(**call).latents).abs().max()) > 1e-2
