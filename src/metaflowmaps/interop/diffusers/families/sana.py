"""SANA: flow matching on the latents of a deep-compression autoencoder, masked prompts."""

from torch import Tensor

from metaflowmaps.interop.diffusers.family import Family, Request, Rows

MASKED = ("prompt_embeds", "prompt_attention_mask")
MASKED_RETURNS = (*MASKED, "negative_prompt_embeds", "negative_prompt_attention_mask")


class Sana(Family):
    """``SanaPipeline``; pictures have the size that is asked for (``use_resolution_binning`` is left to the user)."""

    pipelines = ("SanaPipeline",)
    embeddings, returns = MASKED, MASKED_RETURNS
    options = ("guidance_scale", "use_resolution_binning")
    encoding = ("max_sequence_length", "clean_caption", "complex_human_instruction")

    def multiple(self) -> int:
        """One token a coordinate of a latent."""
        return int(self.pipe.vae_scale_factor)

    def evaluate(self, y: Tensor, clock: Tensor, rows: Rows, request: Request) -> Tensor:
        """The velocity."""
        network = self.networks[0]
        out: Tensor = network(
            y,
            encoder_hidden_states=rows["prompt_embeds"],
            encoder_attention_mask=rows["prompt_attention_mask"],
            timestep=clock * network.config.timestep_scale,
            return_dict=False,
        )[0]
        return out
