"""Tiny pipelines of every family, made offline from their own classes, with embeddings in place of text encoders."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

PIXELS = 32
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vae(levels: int = 3, **config: Any) -> Any:
    """2^(levels − 1) pixels a side for each coordinate of a latent."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        **config,
    )


def assemble(kind: type, **parts: Any) -> Any:
    """A pipeline of these parts; text encoders and whatever else is missing are None."""
    places = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    required = {
        name: None
        for name in places
        if inspect.signature(kind.__init__).parameters[name].default is inspect.Parameter.empty
    }
    pipe = kind(**(required | parts))
    pipe.set_progress_bar_config(disable=True)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


@dataclass
class Tiny:
    """A pipeline, and calls of it that are compared with its own.

    Args:
        make: the pipeline.
        embeds: of two prompts, by argument names.
        negative: of two negative prompts.
        calls: options of plain and of guided calls; guided ones get the negative embeddings.
        size: of pictures or videos.
        steps: of a call.
    """

    make: Callable[[], Any]
    embeds: dict[str, Any]
    negative: dict[str, Any]
    calls: dict[str, dict[str, Any]]
    size: dict[str, int] = field(default_factory=lambda: {"height": PIXELS, "width": PIXELS})
    steps: int = 3


def seeded(make: Callable[[], Any]) -> Callable[[], Any]:
    """Weights of a fixed seed, random where they begin at zero: outputs must depend on every input."""

    def made() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = make()
            for part in pipe.components.values():
                for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
                    if not bool(weight.any()):
                        torch.nn.init.normal_(weight, std=0.1)
        return pipe

    return made


def stable_diffusion_3() -> Any:
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    own = vae(scaling_factor=1.5, shift_factor=0.06)
    return assemble(diffusers.StableDiffusion3Pipeline, transformer=network, scheduler=scheduler, vae=own)


def flux() -> Any:
    network = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    own = vae(scaling_factor=0.36, shift_factor=0.11)
    return assemble(diffusers.FluxPipeline, transformer=network, scheduler=scheduler, vae=own)


def stable_diffusion(scheduler: Any = None) -> Any:
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    if scheduler is None:
        scheduler = diffusers.DDIMScheduler(**TABLE, clip_sample=False, set_alpha_to_one=False)
    return assemble(
        diffusers.StableDiffusionPipeline,
        unet=network,
        scheduler=scheduler,
        vae=vae(),
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )
    scheduler = diffusers.EulerDiscreteScheduler(**TABLE, timestep_spacing="leading", interpolation_type="linear")
    own = vae(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.2, 1.0])
    return assemble(diffusers.StableDiffusionXLPipeline, unet=network, scheduler=scheduler, vae=own)


def flux2() -> Any:
    network = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    own = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    own.bn.running_mean.normal_(std=0.3)
    own.bn.running_var.uniform_(0.5, 2.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return assemble(diffusers.Flux2Pipeline, transformer=network, scheduler=scheduler, vae=own)


def sana() -> Any:
    network = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    own = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        decoder_conv_act_fn="silu",  # without kinks, for finite differences
        scaling_factor=0.41407,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    return assemble(diffusers.SanaPipeline, transformer=network, scheduler=scheduler, vae=own)


def aura_flow() -> Any:
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return assemble(diffusers.AuraFlowPipeline, transformer=network, scheduler=scheduler, vae=vae(scaling_factor=0.13))


def lumina2() -> Any:
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=16,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    own = vae(4, scaling_factor=0.36, shift_factor=0.11)
    return assemble(diffusers.Lumina2Pipeline, transformer=network, scheduler=scheduler, vae=own)


def qwen_image() -> Any:
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    own = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.8, 1.0],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    return assemble(diffusers.QwenImagePipeline, transformer=network, scheduler=scheduler, vae=own)


def wan_network() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )


def wan(**options: Any) -> Any:
    own = diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.8, 1.0],
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return assemble(diffusers.WanPipeline, transformer=wan_network(), scheduler=scheduler, vae=own, **options)


def wan22() -> Any:
    return wan(transformer_2=wan_network(), boundary_ratio=0.875)


def z_image() -> Any:
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 64, 64],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    own = vae(scaling_factor=0.36, shift_factor=0.11)
    return assemble(diffusers.ZImagePipeline, transformer=network, scheduler=scheduler, vae=own)


TOKENS = {"prompt_embeds": normal(2, 5, 16, seed=1)}
OTHER_TOKENS = {"negative_prompt_embeds": normal(2, 5, 16, seed=2)}
POOLED = TOKENS | {"pooled_prompt_embeds": normal(2, 12, seed=3)}
OTHER_POOLED = OTHER_TOKENS | {"negative_pooled_prompt_embeds": normal(2, 12, seed=4)}

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
MASKED = TOKENS | {"prompt_attention_mask": MASK}
OTHER_MASKED = OTHER_TOKENS | {"negative_prompt_attention_mask": MASK.flip(0)}
LONGER = {"negative_prompt_embeds": normal(2, 7, 16, seed=5)}
PLAIN, GUIDED = {"guidance_scale": 1.0}, {"guidance_scale": 4.5}
VIDEO = {"height": 16, "width": 16, "num_frames": 3}

FAMILIES = {
    "SD3": Tiny(
        seeded(stable_diffusion_3),
        POOLED,
        OTHER_POOLED,
        {"plain": {"guidance_scale": 1.0}, "guided": {"guidance_scale": 4.5}},
    ),
    "FLUX.1": Tiny(
        seeded(flux),
        POOLED,
        OTHER_POOLED,
        {"plain": {"guidance_scale": 3.5}, "guided": {"guidance_scale": 2.0, "true_cfg_scale": 3.0}},
    ),
    "SD1.5": Tiny(
        seeded(stable_diffusion),
        TOKENS,
        OTHER_TOKENS,
        {
            "plain": {"guidance_scale": 1.0},
            "guided": {"guidance_scale": 7.5},
            "rescaled": {"guidance_scale": 7.5, "guidance_rescale": 0.7},
        },
    ),
    "SDXL": Tiny(seeded(stable_diffusion_xl), POOLED, OTHER_POOLED, {"plain": PLAIN, "guided": GUIDED}),
    "FLUX.2": Tiny(seeded(flux2), TOKENS, {}, {"plain": {"guidance_scale": 4.0}}),
    "SANA": Tiny(
        seeded(sana),
        MASKED,
        OTHER_MASKED,
        {
            "plain": PLAIN | {"use_resolution_binning": False},
            "guided": GUIDED | {"use_resolution_binning": False, "negative_prompt": None},
        },
    ),
    "AuraFlow": Tiny(seeded(aura_flow), MASKED, OTHER_MASKED, {"plain": PLAIN, "guided": GUIDED}),
    "Lumina2": Tiny(
        seeded(lumina2),
        MASKED,
        OTHER_MASKED,
        {
            "plain": PLAIN,
            "guided": GUIDED,
            "in part": GUIDED | {"cfg_trunc_ratio": 0.5, "cfg_normalization": False},
        },
    ),
    "Qwen-Image": Tiny(
        seeded(qwen_image),
        TOKENS | {"prompt_embeds_mask": MASK},
        LONGER | {"negative_prompt_embeds_mask": torch.ones(2, 7, dtype=torch.long)},
        {"plain": {"true_cfg_scale": 1.0}, "guided": {"true_cfg_scale": 4.0}},
    ),
    "Wan 2.1": Tiny(seeded(wan), TOKENS, OTHER_TOKENS, {"plain": PLAIN, "guided": GUIDED}, VIDEO),
    "Wan 2.2": Tiny(
        seeded(wan22),
        TOKENS,
        OTHER_TOKENS,
        {"plain": PLAIN, "guided": GUIDED | {"guidance_scale_2": 3.0}},
        VIDEO,
    ),
    "Wan 2.2 TI2V": Tiny(seeded(lambda: wan(expand_timesteps=True)), TOKENS, OTHER_TOKENS, {"guided": GUIDED}, VIDEO),
    "Z-Image": Tiny(
        seeded(z_image),
        {"prompt_embeds": [normal(5, 16, seed=1), normal(3, 16, seed=2)]},
        {"negative_prompt_embeds": [normal(4, 16, seed=3), normal(2, 16, seed=4)]},
        {
            "plain": {"guidance_scale": 0.0},
            "guided": {"guidance_scale": 4.0},
            "shortened": {"guidance_scale": 4.0, "cfg_normalization": 0.9, "cfg_truncation": 0.6},
        },
    ),
}
