"""Where samples come from: laws, and data sets of images in [−1, 1] or latents of unit size."""

from metaflowmaps.data.arrays import Arrays
from metaflowmaps.data.context_source import ContextSource
from metaflowmaps.data.data_source import DataSource, SampleSource, read_examples, read_source
from metaflowmaps.data.emoji import Emoji
from metaflowmaps.data.image_set import Examples, ImageSet
from metaflowmaps.data.law_source import Mixture
from metaflowmaps.data.load import Digits, Images, Latents, Mnist
from metaflowmaps.data.moving_digits import MovingDigits
from metaflowmaps.data.paths import ContextLaw
from metaflowmaps.data.sequences import Process, Sequences
from metaflowmaps.data.simulator import Simulator

__all__ = [
    "Arrays",
    "ContextLaw",
    "ContextSource",
    "DataSource",
    "Digits",
    "Emoji",
    "Examples",
    "ImageSet",
    "Images",
    "Latents",
    "Mixture",
    "Mnist",
    "MovingDigits",
    "Process",
    "SampleSource",
    "Sequences",
    "Simulator",
    "read_examples",
    "read_source",
]
