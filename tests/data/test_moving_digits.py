"""Moving digits: where they are drawn, how they move and turn back, and what is held out."""

import pytest
import torch

from metaflowmaps.data import MovingDigits
from metaflowmaps.data.moving_digits import drawn
from metaflowmaps.errors import InputError
from metaflowmaps.random import stream


def test_a_digit_lies_where_its_corner_is_and_the_brighter_pixel_is_seen():
    dim, bright = (torch.full((1, 1, 2, 2), level) for level in (0.0, 1.0))
    corners = torch.tensor([[[[0.0, 0.0], [1.0, 1.0]], [[2.0, 1.0], [0.5, 3.0]]]])  # (path, time, digit, (x, y))
    frames = drawn(torch.stack([dim, bright], 1), corners, 5)[0, :, 0]
    black = -1.0
    expected = torch.full((2, 5, 5), black)
    expected[0, :2, :2] = 0.0
    expected[0, 1:3, 1:3] = 1.0
    expected[1, 1:3, 2:4] = 0.0
    expected[1, 3:5, :3] = torch.tensor([0.0, 1.0, 0.0])  # half a pixel to the right
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)


def test_digits_move_by_their_speed_and_turn_back_at_walls():
    source = MovingDigits(length=40, speed=(0.05, 0.05))
    frames = source.frames(torch.ones(3, 1, 28, 28), 20, stream(0, "frames"))
    assert frames.shape == (20, 40, 1, 32, 32)
    assert float(frames.min()) == -1
    assert float(frames.max()) <= 1 + 1e-5
    ink = (frames[:, :, 0] + 1) / 2
    # each side of the frame is met in 40 steps of 1.6 pixels, and nothing is left outside: two squares of 14²
    assert bool((ink.amax((0, 1))[[0, 0, -1, -1], [0, -1, 0, -1]] > 0).all())
    total = ink.sum((2, 3))
    assert float(total.max()) <= 2 * 14**2 + 1e-2
    assert float(total.min()) >= 14**2 - 1e-2  # one right above the other
    # where nothing overlaps before and after, the centre moves by no more than the mean of both speeds
    place = torch.arange(32.0)
    centre = torch.stack([(ink.sum(axis) * place).sum(-1) / total for axis in (2, 3)], -1)
    apart = total > 2 * 14**2 - 1e-2
    both = apart[:, 1:] & apart[:, :-1]
    assert bool(both.any())
    assert float(centre.diff(dim=1).norm(dim=-1)[both].max()) <= 1.6 + 1e-3


def test_moving_digits_without_files_are_refused():
    with pytest.raises(InputError, match="--data FOLDER"):
        MovingDigits().paths()
    with pytest.raises(InputError, match=r"lower data\.num"):
        MovingDigits(path="mnist", num=100_000, length=100).paths()
