"""The published meta flow map: every embedder of ours under its own name, inner times reversed, the context's not.

``v_{s,u}(x̄; t, x) = −mfm(x̄, 1 − s, 1 − u, x, t, y, w)`` with the guidance scales 1 and 2.5. It was trained on
labels at 2.5 and on the null class at 1, never on a label at 1.
"""

from metaflowmaps.guidance import RELEASED_MFM
from metaflowmaps.interop.pretrained.layout import Family

MFM = Family(
    "mfm",
    "mfm",
    {
        "x_cond_embedder": ("context_patches",),
        "x_cond_adaLN": ("context_gate",),
        "s_embedder": ("early_a",),
        "t_embedder": ("early_b",),
        "t_cond_embedder": ("context_time",),
        "s_embedder_second": ("late_a",),
        "t_embedder_second": ("late_b",),
        "guidance_embedder": ("guidance",),
    },
    reversed_times=("early_a", "early_b", "late_a", "late_b"),
    negated=True,
    doubled=False,
    guidance=True,
    harmless=("latents_scale", "latents_bias"),  # of its autoencoder, registered beside the network
    law=RELEASED_MFM,
    decoder="stabilityai/sd-vae-ft-mse",
)
