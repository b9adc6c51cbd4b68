"""A page that stands alone: its style and its script are inside, nothing is loaded and nothing else runs."""

import html
import io
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from torch import Tensor

HERE = Path(__file__).parent


def escaped(value: object) -> str:
    """As text of a page, whatever it holds."""
    return html.escape(str(value))


def asset(name: str, folder: Path = HERE) -> str:
    """A style or a script of this package."""
    return (folder / name).read_text(encoding="utf-8")


def data_uri(x: Tensor) -> str:
    """The address of a picture that stands in the page: (C, H, W) bytes, C = 1 or 3."""
    from PIL import Image

    pixels, encoded = x.permute(1, 2, 0).contiguous().numpy(), io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(encoded, "png")
    return f"data:image/png;base64,{b64encode(encoded.getvalue()).decode()}"


def document(title: str, body: str, style: str, script: str = "", sources: str = "") -> str:
    """The page.

    Args:
        title: of the window.
        body: its markup, escaped by whoever made it.
        style: its style sheet.
        script: the one script that its policy lets run, named by its hash; an injected one is refused.
        sources: what its policy allows besides pictures of its own.
    """
    digest = b64encode(sha256(script.encode()).digest()).decode()
    allowed = f"; script-src 'sha256-{digest}'" if script else ""
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{allowed}{sources}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escaped(title)}</title><style>{style}</style></head><body>{body}"
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )
