"""AuraFlow: flow matching, its clock in [0, 1], true guidance."""

from torch import Tensor

from metaflowmaps.interop.diffusers.families.sana import MASKED, MASKED_RETURNS
from metaflowmaps.interop.diffusers.family import Family, Request, Rows


class AuraFlow(Family):
    """``AuraFlowPipeline``: masks are worked into its embeddings."""

    pipelines = ("AuraFlowPipeline",)
    embeddings, returns = MASKED, MASKED_RETURNS

    def evaluate(self, y: Tensor, clock: Tensor, rows: Rows, request: Request) -> Tensor:
        """The velocity."""
        out: Tensor = self.networks[0](
            y,
            encoder_hidden_states=rows["prompt_embeds"],
            timestep=(clock / 1000).to(y.dtype),
            return_dict=False,
        )[0]
        return out
