r"""Class guidance: what a labelled velocity is, and what it becomes when a scale w is asked for.

    b_w = b_∅ + w (b_y − b_∅)

Published networks differ in what they give for a label. SiT gives the plain b_y. DMF was trained to give a velocity
that is guided already, by w₀ = 2.5 at noise times up to 0.7, and guiding it again by w would teach w₀ w. Since
``b_{w₀} − b_∅ = w₀ (b_y − b_∅)``, one rule serves both, with w₀ = 1 for the plain ones:

    b_w = b_∅ + (w / w₀) (b_given − b_∅)        on the law's times; b_given, which is b_y, outside of them

So at w = w₀ the network's own output is the answer, with one evaluation. A narrower interval makes of a plain law one
that guides there alone, ``channels`` one that guides the first few channels (SiT's own figures: 3 of 4).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, batch_time, expand_time, positive
from metaflowmaps.errors import InputError


@dataclass(frozen=True)
class GuidanceLaw:
    """What a network gives for a label, and where guidance acts.

    Args:
        scale: w₀, by which its labelled velocity is guided where nobody asks; 1 is plain.
        since: the first time (data at 1) at which guidance acts.
        until: the last such time.
        channels: how many of the first channels guidance acts on; None for all.
        asked: the network reads the scale itself, and has learned labels at ``scale`` alone.
    """

    scale: float = 1.0
    since: float = 0.0
    until: float = 1.0
    channels: int | None = None
    asked: bool = False

    def __post_init__(self) -> None:
        positive(self.scale, "the scale of a guidance law")
        if not 0 <= self.since <= self.until <= 1:
            raise InputError(f"guidance acts on times 0 <= since <= until <= 1, got since={self.since}, {self.until}")
        if self.channels is not None and (not isinstance(self.channels, int) or self.channels < 1):
            raise InputError(f"guided channels are counted from 1, got {self.channels!r}: None for all")

    def factor(self, t: Tensor, w: Tensor) -> Tensor:
        """By how much b_given − b_∅ is stretched, (B,), for times and asked scales (B,)."""
        inside = (t >= self.since) & (t <= self.until)
        return torch.where(inside, w.to(t) / self.scale, torch.ones_like(t))

    def guide(self, given: Tensor, null: Tensor, factor: Tensor) -> Tensor:
        """b_∅ + factor (b_given − b_∅), on the channels where it acts: (B, *event), twice, (B,) -> (B, *event)."""
        guided = null + expand_time(factor, null) * (given - null)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], given[:, self.channels :]], 1)

    def described(self) -> dict[str, Any]:
        """The law as a checkpoint keeps it."""
        return asdict(self)


PLAIN = GuidanceLaw()
DMF = GuidanceLaw(2.5, since=0.3)  # guided at noise times up to .7
DMF_512 = GuidanceLaw(2.5, since=0.2)
RELEASED_MFM = GuidanceLaw(2.5, asked=True)
BY_FAMILY = {"mfm": RELEASED_MFM, "dmf": DMF, "sit": PLAIN}  # of checkpoints that name their family and no law


def read_law(described: Mapping[str, Any]) -> GuidanceLaw | None:
    """The law in a map's configuration; None for a map whose scales mean what they say."""
    law = described.get("guidance_law")
    if law is not None:
        return GuidanceLaw(**law)
    origin = described.get("origin")
    return BY_FAMILY.get(str(origin.get("family"))) if isinstance(origin, Mapping) else None


def guided_drift(drift: Any, cond: Cond, null_class: int, law: GuidanceLaw = PLAIN) -> Callable[[Any, Tensor], Tensor]:
    """b_w at each row's label and scale; one call, in which only rows that guidance moves come twice.

    Args:
        drift: ``drift(t, x, cond)``, (B,), (B, *event) -> (B, *event), which takes labels.
        cond: "label" (B,), and "guidance" (B,) or nothing for what the network itself gives.
        null_class: the label of no class.
        law: what the network gives for a label.

    Returns:
        ``b(t, x)``.
    """
    label = (cond or {})["label"]
    scale = (cond or {}).get("guidance")
    if scale is None:
        return lambda t, x: drift(t, x, {"label": label})

    def guided(t: Any, x: Tensor) -> Tensor:
        factor = law.factor(batch_time(t, x), scale.to(x))
        rows = ((factor != 1) & (label != null_class)).nonzero().squeeze(1)
        if not len(rows):
            out: Tensor = drift(t, x, {"label": label})
            return out
        times = torch.cat([t, t[rows]]) if isinstance(t, Tensor) and t.ndim else t
        labels = torch.cat([label, torch.full_like(label[rows], null_class)])
        both = drift(times, torch.cat([x, x[rows]]), {"label": labels})
        own, null = both[: len(x)], both[len(x) :]
        out = own.index_copy(0, rows, law.guide(own[rows], null, factor[rows]).to(own))
        return out

    return guided
