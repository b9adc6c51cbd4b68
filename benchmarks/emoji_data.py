"""Make the package's emoji of the 64×64 ones: ``python -m benchmarks.emoji_data FILE.npz``, with its arrays images,
labels, classes and names.

Pictures are halved by averages of 2 × 2 pixels. They lie in an .npz file that is compressed whole, since neighbours
often differ in one colour: 3.9 MB instead of 4.9.
"""

import io
import lzma
import sys

import numpy as np

from metaflowmaps.data.emoji import EMOJI_FILE

SIDE = 32


def main() -> None:
    with np.load(sys.argv[1]) as arrays:
        images, labels = arrays["images"], arrays["labels"]
        classes, names = arrays["classes"], arrays["names"]
    small = images.reshape(len(images), SIDE, 2, SIDE, 2, 3).mean((2, 4)).round().astype(np.uint8)
    held = io.BytesIO()
    np.savez(held, images=small, labels=labels.astype(np.uint8), classes=classes, names=names)
    EMOJI_FILE.write_bytes(lzma.compress(held.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(small):,} pictures, {EMOJI_FILE.stat().st_size:,} bytes in {EMOJI_FILE}")


if __name__ == "__main__":
    main()
