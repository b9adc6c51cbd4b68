"""Text to pictures and videos: a diffusers pipeline that steers."""

from metaflowmaps.prompted.prompted_pipeline import PromptedPipeline, from_diffusers

__all__ = ["PromptedPipeline", "from_diffusers"]
