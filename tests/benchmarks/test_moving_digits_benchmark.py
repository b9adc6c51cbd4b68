"""The showcase of moving digits: where ink lies, what pixels extrapolate to, and ranks of exact draws."""

import torch
from benchmarks.moving_digits import BINS, DRAWS, FORECASTS, by_observed, centre, extrapolated, of_length
from torch import Tensor

from metaflowmaps.context import Context
from metaflowmaps.data.paths import ContextLaw, Paths
from metaflowmaps.random import stream


def test_the_centre_of_ink_is_its_mean_place():
    frames = torch.full((2, 1, 8, 8), -1.0)
    frames[0, 0, 2, 5] = 1.0
    frames[1, 0, 0, 0], frames[1, 0, 4, 6] = 0.0, 1.0  # ink 1 and 2
    torch.testing.assert_close(centre(frames), torch.tensor([[5.0, 2.0], [4.0, 8 / 3]]))


def test_pixels_are_extrapolated_from_the_last_two_frames_whatever_their_order():
    values = torch.tensor([0.1, -0.5, -0.2]).reshape(1, 3, 1, 1, 1)
    times = torch.tensor([2.0, 0.0, 1.0])
    assert float(extrapolated(Context(values, times, query=3.0))) == torch.tensor(0.1) * 2 + 0.2
    alone = Context(values, times, torch.tensor([False, True, False]), 3.0)
    assert float(extrapolated(alone)) == -0.5  # one frame says nothing of motion


class _Known:
    """Draws of a law that no frame tells of, moved by ``bias`` to the right."""

    def __init__(self, bias: int) -> None:
        self.bias = bias

    def draw(self, context: Context, num_draws: int, generator: torch.Generator) -> Tensor:
        """Frames with one white pixel anywhere."""
        return _dots((num_draws, len(context)), generator).roll(self.bias, -1)


def _dots(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    frames = torch.full((*shape, 1, 16, 16), -1.0)
    place = torch.randint(0, 12 * 16, shape, generator=generator)
    where = place // 12 * 16 + place % 12  # in the left three quarters
    return frames.flatten(-2).scatter(-1, where[..., None, None], 1.0).unflatten(-1, (16, 16))


def test_ranks_of_exact_draws_are_uniform_and_those_of_moved_ones_are_not():
    paths = Paths(_dots((400, 4), stream(0, "dots")), torch.arange(4.0), ContextLaw(place="latest", window=3))
    exact, ranks = by_observed(_Known(0), of_length(paths, 2), 2)
    moved, _ = by_observed(_Known(4), of_length(paths, 2), 2)
    assert int(ranks.sum()) == 2 * FORECASTS
    assert len(ranks) == BINS
    # five deviations of a share of 2 · 128 ranks; ties of the 12 and 16 places count as below: half a rank, 1/32
    assert abs(exact["inside_half"] - 0.5) < 5 * 0.5 / (2 * FORECASTS) ** 0.5 + 1 / (2 * (DRAWS + 1))
    assert moved["centre_error"] > exact["centre_error"] + 0.5
    assert moved["outermost"] > exact["outermost"] + 0.05
