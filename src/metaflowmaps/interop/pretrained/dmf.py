"""DMF, the decoupled flow map: data at time 0, the encoder reads one time and the decoder the other.

``v_{s,u}(x) = −dmf(x, 1 − s, 1 − u, y)``, through one embedder of times for both.
"""

from metaflowmaps.interop.pretrained.layout import Family

DMF = Family(
    "dmf", {"t_embedder": ("early_a", "late_b")}, reversed_times=("early_a", "late_b"), negated=True, doubled=False
)
