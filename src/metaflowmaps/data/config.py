"""Which images, and how many of them."""

from typing import Literal

from pydantic import Field, model_validator

from metaflowmaps.work.config import Config


class DataConfig(Config):
    """A data set of images and its two parts."""

    name: Literal["digits", "mnist", "images", "latents"]
    # mnist: the folder of the IDX files; images: a folder, or an .npy or .npz file; latents: what encode-latents wrote
    path: str | None = None
    size: int | None = Field(None, ge=1, le=1024)  # images: side of the square; None: the most common one, at most 64
    channels: Literal[1, 3] | None = None  # images: None: 1 if all are grey, else 3
    limit: int | None = Field(None, ge=1)  # images to train on, at most; the held-out part does not depend on it
    hold_out: int | None = Field(None, ge=1)  # None: digits 297, mnist 1,000, images a tenth, latents at most 10,000
    labels: bool = False  # condition on classes

    @model_validator(mode="after")
    def _possible(self) -> "DataConfig":
        if self.name == "digits" and self.path is not None:
            raise ValueError("digits come with the package and take no path: for your own files set name=images")
        if self.name == "latents" and (self.size is not None or self.channels is not None):
            raise ValueError("latents keep the shape they were encoded with: leave size and channels unset")
        if self.name != "images" and self.channels == 3:
            raise ValueError(f"{self.name} has one channel: leave channels unset, or set name=images")
        return self
