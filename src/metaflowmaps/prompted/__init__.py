"""Text to pictures and videos: a diffusers pipeline that steers."""

from metaflowmaps.prompted.opening_pipelines import from_diffusers
from metaflowmaps.prompted.prompted_pipeline import PromptedPipeline

__all__ = ["PromptedPipeline", "from_diffusers"]
