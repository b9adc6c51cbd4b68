"""DMF, the decoupled flow map: data at time 0, the encoder reads one time and the decoder the other.

``v_{s,u}(x) = −dmf(x, 1 − s, 1 − u, y)``, through one embedder of times for both. The file of 256 pixels holds the
layer by which its training weighed times, ``logvar_linear``; that of 512 pixels normalises queries and keys. For a
label both give a velocity that is guided already (:mod:`metaflowmaps.guidance`).
"""

from metaflowmaps import guidance
from metaflowmaps.interop.pretrained.layout import Family

DMF = Family(
    "dmf",
    "dmf",
    {"t_embedder": ("early_a", "late_b")},
    reversed_times=("early_a", "late_b"),
    negated=True,
    doubled=False,
    harmless=("logvar_linear.",),
    law=guidance.DMF,
)
DMF_512 = DMF._replace(layout="dmf-512", head_norms=True, law=guidance.DMF_512)
