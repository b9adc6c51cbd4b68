"""Methods with processes that go together: what is steered with where nobody says, and what suits pictures.

    mfm.steer(model, reward, 16, *mfm.IMAGES)

``USUAL`` is held against exact tilted laws (docs/log.md: defaults). ``IMAGES`` takes the direction of a single draw's
gradient and the drift's length, the paper's setting for ImageNet: it leaves the theory, and is what pictures look best
by.
"""

from typing import NamedTuple

from metaflowmaps.steering.method import Method
from metaflowmaps.steering.mfm_g import MFMG
from metaflowmaps.steering.mfm_gf import MFMGF
from metaflowmaps.steering.process import ODE, Process


class Preset(NamedTuple):
    """A method and the process it runs on."""

    method: Method
    process: Process


USUAL = Preset(MFMGF(num_draws=4), ODE())
IMAGES = Preset(MFMG(num_draws=1, blend=False), ODE(steps=50, renormalize="rescale"))
PRESETS = {"usual": USUAL, "images": IMAGES}
