"""Steering: inference-time alignment. ``steer`` is the entry; a method is one frozen dataclass in one file."""

from metaflowmaps.steering.advise import Advice, advise
from metaflowmaps.steering.anneal import Anneal
from metaflowmaps.steering.best_of_n import BestOfN
from metaflowmaps.steering.dps import DPS
from metaflowmaps.steering.exact import Exact
from metaflowmaps.steering.glass import Glass
from metaflowmaps.steering.method import Guidance, GuidedMethod, Method
from metaflowmaps.steering.mfm_g import MFMG
from metaflowmaps.steering.mfm_gf import MFMGF
from metaflowmaps.steering.pool import Resampling
from metaflowmaps.steering.presets import IMAGES, PRESETS, USUAL, Preset
from metaflowmaps.steering.process import ODE, SDE, Process
from metaflowmaps.steering.rejection import Rejection
from metaflowmaps.steering.result import SteerResult
from metaflowmaps.steering.search import Search
from metaflowmaps.steering.smc import SMC
from metaflowmaps.steering.steer import SteeringFailed, Step, steer
from metaflowmaps.steering.tds import TDS
from metaflowmaps.steering.twisted import log_normaliser
from metaflowmaps.steering.unsteered import Unsteered

__all__ = [
    "DPS",
    "IMAGES",
    "MFMG",
    "MFMGF",
    "ODE",
    "PRESETS",
    "SDE",
    "SMC",
    "TDS",
    "USUAL",
    "Advice",
    "Anneal",
    "BestOfN",
    "Exact",
    "Glass",
    "Guidance",
    "GuidedMethod",
    "Method",
    "Preset",
    "Process",
    "Rejection",
    "Resampling",
    "Search",
    "SteerResult",
    "SteeringFailed",
    "Step",
    "Unsteered",
    "advise",
    "log_normaliser",
    "steer",
]
