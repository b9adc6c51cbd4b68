"""What all image experiments are: cells, each dear to draw and a shard of its own, and one judgement of them all.

A cell is a function of its name and of the configuration; any worker may draw it. Judging is cheap, and done once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig, ImageSetup, Say
from metaflowmaps.work.shards import Shard

Settings = TypeVar("Settings", bound=ImageEvalConfig)
Result = TypeVar("Result")
Cells = Mapping[str, Callable[[], Shard]]
Drawn = Callable[[str], Shard]  # the draws of a cell by its name


class ImageExperiment(ABC, Generic[Settings, Result]):
    """One question about a map of images or of latents.

    Args:
        setup: the map, and what judges it.
        config: the settings of the question.
        say: takes a line of progress.
    """

    def __init__(self, setup: ImageSetup, config: Settings, say: Say = lambda line: None) -> None:
        self.setup, self.config, self.say = setup, config, say

    @abstractmethod
    def cells(self) -> Cells:
        """What draws each cell."""

    @abstractmethod
    def judge(self, drawn: Drawn) -> Result:
        """Figures and pictures of what was drawn."""

    def run(self) -> Result:
        """Draw what is missing, and judge it."""
        return self.judge(self.setup.share(self.cells()))
