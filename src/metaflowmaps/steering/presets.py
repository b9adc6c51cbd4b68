"""Methods with processes that go together: what is steered with where nobody says, and what suits pictures.

    mfm.steer(model, reward, 16, *mfm.IMAGES)

``USUAL`` spends on draws what 250 steps spent on time: it is held against exact tilted laws (``python -m benchmarks
defaults``). ``IMAGES`` takes the direction of a single draw's
gradient and the drift's length, the paper's setting for ImageNet: it leaves the theory, and is what pictures look best
by.
"""

from typing import NamedTuple

from metaflowmaps.steering.method import Method
from metaflowmaps.steering.mfm_g import MFMG
from metaflowmaps.steering.mfm_gf import MFMGF
from metaflowmaps.steering.process import ODE, Process
from metaflowmaps.work.choices import built


class Preset(NamedTuple):
    """A method and the process it runs on."""

    method: Method
    process: Process


USUAL = Preset(MFMGF(num_draws=16), ODE(steps=60))
IMAGES = Preset(MFMG(num_draws=1, blend=False), ODE(steps=50, renormalize="rescale"))
PRESETS = {"usual": USUAL, "images": IMAGES}


def settled(method: Method | str | None, process: Process | str | None) -> Preset:
    """Method and process: ``USUAL`` where nothing is said, the process that a named method prefers."""
    made = USUAL.method if method is None else built(Method, method)
    if process is not None:
        return Preset(made, built(Process, process))
    return Preset(made, USUAL.process if method is None else made.usual())
