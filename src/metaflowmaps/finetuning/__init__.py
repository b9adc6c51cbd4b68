"""Fine-tuning: the tilt e^r put into the weights of a map, by the paper's objective and by its rivals."""

from metaflowmaps.finetuning.adjoint_matching import AdjointMatching
from metaflowmaps.finetuning.baseline import Baseline, DrawnBaseline, LearnedBaseline, NoBaseline, RunningBaseline
from metaflowmaps.finetuning.direct import Direct
from metaflowmaps.finetuning.draft import DRaFT
from metaflowmaps.finetuning.mfm_ft import MFMFT, SelfNormalised
from metaflowmaps.finetuning.ram import RAM
from metaflowmaps.finetuning.state_laws import StateLaw, StateMixture, StateSource
from metaflowmaps.finetuning.tilt_matching import TiltMatching
from metaflowmaps.finetuning.tuning_objective import Regression, TargetBatch, TuningObjective, TuningSetup

__all__ = [
    "MFMFT",
    "RAM",
    "AdjointMatching",
    "Baseline",
    "DRaFT",
    "Direct",
    "DrawnBaseline",
    "LearnedBaseline",
    "NoBaseline",
    "Regression",
    "RunningBaseline",
    "SelfNormalised",
    "StateLaw",
    "StateMixture",
    "StateSource",
    "TargetBatch",
    "TiltMatching",
    "TuningObjective",
    "TuningSetup",
]
