"""A labelled set of made pictures of any size: coloured shapes, whose class shows in shape and colour.

For tests and rehearsals where no photographs are at hand. Class folders, as ImageNet has; the same files for a seed.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import InputError

SHAPES = ("disc", "square", "ring", "stripes", "cross", "triangle")
FORMATS = ("png", "jpeg")


def write_synthetic(
    folder: str | Path, classes: int = 4, per_class: int = 8, size: int = 256, seed: int = 0, kind: str = "png"
) -> Path:
    """Write ``classes`` folders with ``per_class`` pictures each, size × size; returns the folder."""
    for number, name in ((classes, "classes"), (per_class, "per_class"), (size, "size")):
        check_count(number, name)
    if kind not in FORMATS:
        raise InputError(f"kind must be {' or '.join(FORMATS)}, got {kind!r}")
    root = Path(folder)
    for label in range(classes):
        place = root / f"class-{label:04d}-{SHAPES[label % len(SHAPES)]}"
        place.mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            image = Image.fromarray(draw(label, classes, size, np.random.default_rng((seed, label, i))))
            if kind == "png":
                image.save(place / f"{i:05d}.png", compress_level=1)
            else:
                image.save(place / f"{i:05d}.jpeg", quality=95)
    return root


def draw(label: int, classes: int, size: int, random: np.random.Generator) -> np.ndarray:
    """One picture of a class, (size, size, 3) uint8: a shape of its hue, anywhere, on a grey slope."""
    v, u = np.mgrid[0:size, 0:size] / size
    angle, level = random.uniform(0, 2 * math.pi), random.uniform(0.3, 0.7)
    ground = level + 0.25 * ((u - 0.5) * math.cos(angle) + (v - 0.5) * math.sin(angle))
    centre, radius = random.uniform(0.35, 0.65, 2), random.uniform(0.2, 0.3)
    inside = _shape(SHAPES[label % len(SHAPES)], (u - centre[0]) / radius, (v - centre[1]) / radius)
    hue = label / classes + random.uniform(-0.2, 0.2) / classes
    colour = 0.5 + 0.45 * np.cos(2 * math.pi * (hue - np.arange(3) / 3))
    picture = np.where(inside[..., None], colour, ground[..., None])
    noisy = picture + random.normal(0, 0.02, picture.shape)
    pixels: np.ndarray = np.rint(noisy.clip(0, 1) * 255).astype(np.uint8)
    return pixels


def _shape(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points lie in the shape of radius 1 about the origin."""
    r, box = np.hypot(u, v), np.maximum(abs(u), abs(v))
    found: np.ndarray = {
        "disc": lambda: r < 1,
        "square": lambda: box < 0.9,
        "ring": lambda: (r < 1) & (r > 0.6),
        "stripes": lambda: (box < 1) & (np.floor(2.5 * (v + 1)) % 2 == 0),
        "cross": lambda: (box < 1) & (np.minimum(abs(u), abs(v)) < 0.35),
        "triangle": lambda: (v < 0.9) & (v > 2 * abs(u) - 1),
    }[name]()
    return found
