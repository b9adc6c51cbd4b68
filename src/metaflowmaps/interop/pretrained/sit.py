"""SiT: one time, in our direction; twice the outputs, of which the first half counts.

``b_t(x) = sit(x, t, y)[:, :C]``. As a map of ours the first part reads the time at a and the second at b, which on
the diagonal are one: ``model.drift`` is SiT's, and the context counts for nothing yet.

Two relatives have the C outputs alone. SiT-512 (``learn_sigma=False``) is otherwise the same, key for key the shape of
a DMF whose time runs the other way. REPA is a SiT with data at time 0, ``b_t(x) = −repa(x, 1 − t, y)``; its file holds
the ``projectors`` that aligned it with another network's features while it was trained.
"""

from metaflowmaps.interop.pretrained.layout import Family

SIT = Family("sit", "sit", {"t_embedder": ("early_a", "late_b")}, reversed_times=(), negated=False, doubled=True)
SIT_512 = SIT._replace(layout="sit-512", doubled=False)
REPA = SIT._replace(
    layout="repa",
    reversed_times=("early_a", "late_b"),
    negated=True,
    doubled=False,
    harmless=("projectors.",),
    marks="projectors.",
)
