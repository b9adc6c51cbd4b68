"""SiT: one time, in our direction; twice the outputs, of which the first half counts.

``b_t(x) = sit(x, t, y)[:, :C]``. As a map of ours the first part reads the time at a and the second at b, which on
the diagonal are one: ``model.drift`` is SiT's, and the context counts for nothing yet.
"""

from metaflowmaps.interop.pretrained.layout import Family

SIT = Family("sit", {"t_embedder": ("early_a", "late_b")}, reversed_times=(), negated=False, doubled=True)
