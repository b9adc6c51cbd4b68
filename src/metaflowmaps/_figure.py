"""Figures that a notebook shows where a cell ends with one, whether or not its matplotlib is set up."""

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A matplotlib figure without pyplot, which IPython asks for its picture."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()
