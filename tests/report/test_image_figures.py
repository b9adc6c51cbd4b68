"""Figures of image models hold what they were given, pixel by pixel and label by label, and refuse what is not fit."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import AxesImage
from matplotlib.text import Text

from metaflowmaps.errors import InputError
from metaflowmaps.lab.figures import image_figures as f
from metaflowmaps.lab.figures.curves import (
    Floor,
    Frontier,
    against_calls,
    binomial_band,
    by_calls,
    frequencies,
    frontier,
    rank_histograms,
    thinned,
)
from metaflowmaps.lab.figures.looks import looks, style
from metaflowmaps.random import stream


def pictures(n, channels=1, size=8, seed="p"):
    return 2 * torch.rand(n, channels, size, size, generator=stream(0, seed)) - 1


def images(figure):
    """Every picture of a figure as an array."""
    return [np.asarray(image.get_array()) for axis in figure.axes for image in axis.findobj(AxesImage)]


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")) if text.get_text()]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def overlaps(figure):
    """Pairs of drawn texts whose boxes intersect, and texts that leave the figure."""
    drawn = {}

    def draw(text, renderer, original=Text.draw):
        original(text, renderer)
        drawn[text] = (text.get_text(), text.get_window_extent(renderer))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", draw)
        figure.canvas.draw()
    boxes = [shown for text, shown in drawn.items() if text.get_visible() and shown[0].strip()]
    assert boxes
    width, height = figure.canvas.get_width_height()
    outside = [name for name, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1]
    pairs = itertools.combinations(boxes, 2)
    return outside + [(name, other) for (name, a), (other, b) in pairs if a.padded(-1).overlaps(b.padded(-1))]


def test_a_grid_shows_every_pixel_in_its_place():
    rows = [pictures(4, seed="a"), pictures(4, seed="b")]
    figure = f.image_grid(rows, ["t = 0", "t = 0.5"], ["image", "noisy", "draws", ""], "Draws")
    shown = images(figure)
    assert len(shown) == 8
    for array, picture in zip(shown, torch.cat(rows), strict=True):
        np.testing.assert_allclose(array[..., 0], (picture[0] + 1) / 2, atol=1e-7)  # the pictures are float32
    assert {"t = 0", "t = 0.5", "image", "noisy", "draws", "Draws"} <= set(texts(figure))
    assert all(image.get_interpolation() == "nearest" for image in figure.axes[0].findobj(AxesImage))
    lefts = [image.get_extent()[0] for image in figure.axes[0].findobj(AxesImage)]
    assert lefts[:4] == sorted(lefts[:4]) == lefts[4:]
    tops = {image.get_extent()[3] for image in figure.axes[0].findobj(AxesImage)}
    assert len(tops) == 2
    assert overlaps(figure) == []


def test_the_first_row_of_pixels_is_drawn_on_top():
    x = -torch.ones(1, 1, 4, 4)
    x[..., 0, :] = 1
    figure = f.image_grid([x], ["row"])
    figure.canvas.draw()
    page = np.asarray(figure.canvas.buffer_rgba())[::-1]  # rows from the bottom, as display coordinates count
    (column, top), (_, bottom) = figure.axes[0].transData.transform([(0.5, 0.12), (0.5, 0.88)]).astype(int)
    assert page[top, column, 0] == 255
    assert page[bottom, column, 0] == 0


def test_noise_is_clipped_and_colour_is_kept():
    x = torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 5)
    (shown,) = images(f.image_grid([x], ["colour"], title="a title that is much wider than the one picture below it"))
    assert shown.shape == (2, 5, 3)
    assert shown[0, 0].tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 2, 8, 8), (0, 1, 8, 8), (8, 8), (4, 1, 0, 8)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(InputError, match=re.escape(str(shape))):
        f.image_grid([torch.zeros(shape)], ["row"])


def test_grids_that_do_not_fit_are_refused():
    a, b = pictures(3), pictures(4)
    for arguments in (([a, b], ["a", "b"]), ([a], ["a", "b"]), ([], []), ([a], ["a"], ["one", "two"])):
        with pytest.raises(InputError, match="image_grid needs"):
            f.image_grid(*arguments)
    with pytest.raises(InputError, match="story needs"):
        f.story([], [], "title")
    with pytest.raises(InputError, match="mfm-g has shape"):
        f.story([f.Noisy(a[0], a[1], a)], [f.SteeredRow("mfm-g", a[0], "cost")], "title")
    with pytest.raises(InputError, match="spread_maps needs 2"):
        f.spread_maps({"map": (a, a)}, ["one", "two"], "title", a)


def test_the_story_reads_from_left_to_right_with_its_costs():
    noisy = [f.Noisy(pictures(1)[0], pictures(1, seed="n")[0], pictures(5, seed=f"d{k}")) for k in range(2)]
    steered = [
        f.SteeredRow(name, pictures(4, seed=name), f"{i} NFE\n{i} s")
        for i, name in enumerate(("best-of-1000", "dps", "mfm-g"))
    ]
    figure = f.story(noisy, steered, "From noise to choice")
    assert len(images(figure)) == 2 * (2 + 5) + 3 * 4
    assert {"best-of-1000", "dps", "mfm-g", "2 NFE\n2 s", "From noise to choice", "noisy"} <= set(texts(figure))
    assert overlaps(figure) == []
    at = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert at["mfm-g"][0] < at["2 NFE\n2 s"][0]
    assert at["mfm-g"][1] == at["2 NFE\n2 s"][1]


def test_spread_maps_share_one_scale_with_a_bar():
    mean, wide, narrow = pictures(2), torch.full((2, 3, 8, 8), 0.5), torch.full((2, 3, 8, 8), 0.25)
    figure = f.spread_maps({"map": (mean, wide), "GLASS": (mean, narrow)}, ["t = 0", "t = 0.5"], "Spread", pictures(2))
    shown = images(figure)[:10]
    assert len(shown) == 10  # a row of noisy states, two rows a sampler
    assert len(figure.axes) == 3  # the grid and two bars
    assert figure.axes[2].get_ylim() == (0.0, 0.5)
    assert not np.allclose(shown[4], shown[8])
    assert {"standard deviation", "pixel value", "map: std", "GLASS: mean", "t = 0.5"} <= set(texts(figure))
    assert overlaps(figure) == []


def panel(title="race", target=None):
    lines = {
        "mfm-g": [(0, 1.0, 0.0), (1, 0.9, 0.5), (10, 0.7, 1.2)],
        "dps": [(0, 1.0, 0.1), (1, 0.5, 0.2), (10, 0.2, 0.9)],
    }
    return Frontier(title, "diversity", "reward", lines, target)


def test_the_frontier_marks_lambda_and_target_under_one_legend():
    panels = [panel("race", target=(0.8, 1.0)), panel("inverse"), panel("mixture")]
    figure = frontier(panels, "Frontier")
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in axes] == ["race", "inverse", "mixture"]
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("diversity", "reward")
    assert legend(figure) == ["mfm-g", "dps", "data of the target", "numbers along a line: λ, γ or N"]
    lines = {line.get_label(): line for line in axes[0].lines}
    assert lines["mfm-g"].get_xydata().tolist() == [[1.0, 0.0], [0.9, 0.5], [0.7, 1.2]]
    assert lines["mfm-g"].get_color() == looks()["mfm-g"][0]
    assert lines["dps"].get_color() == looks()["dps"][0]
    assert [text.get_text() for text in axes[0].texts].count("10") == 2  # the end of each line
    assert overlaps(figure) == []


def test_a_frontier_leaves_out_what_is_not_finite_and_refuses_what_is_no_point():
    bent = replace(panel(), methods={"dps": [(0, 1.0, 0.0), (1, math.nan, 1.0), (2, 1.0, 3.0)]})
    assert len(frontier([bent]).axes[0].lines[0].get_xdata()) == 2
    for bad in ([], [replace(panel(), methods={"dps": [(0, 1.0)]})]):
        with pytest.raises(InputError, match="frontier"):
            frontier(bad)


def test_lambda_labels_keep_clear_of_each_other_and_of_points():
    lines = {
        name: [(s, 1 - 0.004 * k - 0.1 * s, s + 0.01 * k) for s in range(4)] for k, name in enumerate(list(looks())[:9])
    }
    figure = frontier([replace(panel(), methods=lines)])
    labels = figure.axes[0].texts
    assert len(labels) >= 3
    assert overlaps(figure) == []


def test_curves_against_calls():
    curves = {
        "map": [(1, 3.0), (2, 2.0), (4, 1.0)],
        "glass": [(1, 9.0), (2, 8.0), (4, 7.0), (8, 6.0), (16, 5.0), (32, 4.0)],
    }
    alone = against_calls({"": curves}, "network calls per draw", "Fréchet distance", Floor({"": 0.5}))
    assert len(alone.axes) == 1
    assert legend(alone) == ["map", "glass", "floor: two exact samples"]
    axis = alone.axes[0]
    assert (axis.get_xscale(), axis.get_xlabel(), axis.get_ylabel()) == (
        "log", "network calls per draw", "Fréchet distance",
    )  # fmt: skip
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "2", "4", "8", "16", "32"]
    five = against_calls({f"t = {t}": curves for t in range(5)}, "calls", "distance", Floor({"t = 1": 0.5}))
    shown = [axis for axis in five.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == [f"t = {t}" for t in range(5)]
    assert [len([line for line in axis.lines if line.get_linestyle() == "--"]) for axis in shown] == [0, 1, 0, 0, 0]
    assert [axis.xaxis.label.get_visible() for axis in shown] == [False, False, True, True, True]
    assert overlaps(five) == []
    with pytest.raises(InputError, match="at least one"):
        against_calls({"": {}}, "x", "y")


def test_curves_of_samplers_go_by_their_kinds_and_their_calls():
    cells = {"map-4": 1.0, "map-1": 2.0, "glass-8": 3.0, "exact": 0.5}
    titles = {"map": "map", "glass": "GLASS", "drift-glass": "GLASS, drift alone"}
    assert by_calls(cells, titles) == {"map": [(1, 2.0), (4, 1.0)], "GLASS": [(8, 3.0)]}
    assert by_calls(cells, titles, {"map-4": 4, "map-1": 1, "glass-8": 16})["GLASS"] == [(16, 3.0)]


def test_ticks_of_many_calls_stay_apart():
    ticks = thinned([1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 1000])
    assert ticks[0] == 1
    assert len(ticks) <= 8
    assert all(b / a > 1.5 for a, b in itertools.pairwise(ticks))


def test_frequencies_stay_legible_with_twelve_methods():
    target = [0.1] * 10
    methods = {
        name: [0.1] * 9 + [0.1 + 0.05 * k] for k, name in enumerate([*[*looks()][:10], "mfm-g-plain", "mfm-gf-plain"])
    }
    figure = frequencies(methods, target, "Classes")
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in axes] == [f"{n}\nL2 {0.05 * k:.3f}" for k, n in enumerate(methods)]
    for axis, values in zip(axes, methods.values(), strict=True):
        assert [bar.get_height() for bar in axis.patches] == values
        assert axis.get_ylim()[1] > max(map(max, methods.values()))  # no bar is cut
        assert [segment[0][1] for segment in axis.collections[0].get_segments()] == target
    assert legend(figure) == ["target w"]
    assert overlaps(figure) == []
    with pytest.raises(InputError, match="10 classes"):
        frequencies({"dps": [0.5, 0.5]}, target)


def test_the_band_of_ranks_is_the_binomial_quantile():
    # by summing probabilities of Binomial(20, 1/4) with math.comb
    pmf = [math.comb(20, k) * 0.25**k * 0.75 ** (20 - k) for k in range(21)]
    low, high = binomial_band(20, 0.25)
    assert sum(pmf[:low]) <= 0.025 < sum(pmf[: low + 1])
    assert sum(pmf[high + 1 :]) <= 0.025 < sum(pmf[high:])


def test_rank_histograms_tell_calibrated_from_overconfident():
    flat, bent = np.full(8, 50), np.array([150, 40, 20, 10, 10, 20, 50, 100])
    figure = rank_histograms({"t = 0.2": flat, "t = 0.8": bent}, 31)
    titles = [axis.get_title() for axis in figure.axes]
    low, high = binomial_band(400, 1 / 8)
    share = 100 * ((bent >= low) & (bent <= high)).mean()
    assert titles == ["t = 0.2: 100 % of bars inside", f"t = 0.8: {share:.0f} % of bars inside"]
    assert share < 50
    assert figure.axes[0].get_xlabel() == "rank among 31 draws"
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights[1:] == bent.tolist()  # the band comes first
    assert legend(figure) == ["uniform: calibrated", "95 % of a uniform bar"]
    assert overlaps(figure) == []
    for counts in (np.ones(7), np.array([0.5, 1.5]), np.zeros(8), np.array([5, -1]), np.ones(1)):
        with pytest.raises(InputError, match="divides num_draws"):
            rank_histograms({"map": counts}, 31)


def test_a_method_looks_the_same_everywhere_and_names_of_one_figure_differ():
    assert style("best-of-1000") == style("best-of-n") == style("Best-of-N")
    curve = [(1, 1.0), (2, 2.0)]
    curves = dict.fromkeys(("mfm-g", "mfm-g N=1", "mfm-g N=4", "ours", "theirs"), curve)
    lines = against_calls({"": curves}, "x", "y").axes[0].lines
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(looks) == 5


# Machado, Oliveira and Fernandes 2009, full severity, on linear RGB
SIGHT = {
    "all cones": np.eye(3),
    "no green": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no red": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_of_methods_stay_apart_for_colour_blind_eyes(sight):
    def oklab(colour):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = SIGHT[sight] @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        cones = np.array([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]])
        opponent = np.array([[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]])
        return 100 * opponent @ np.cbrt(cones @ linear.clip(0, 1))

    colours = {name: oklab(colour) for name, (colour, _) in looks().items() if name not in ("map", "ode")}
    nearest = min((float(np.linalg.norm(colours[a] - colours[b])), a, b) for a, b in itertools.combinations(colours, 2))
    assert nearest[0] > 8, nearest  # four times the 2 units at which OKLab colours side by side are told apart
    assert len({marker for name, (_, marker) in looks().items() if name not in ("map", "ode")}) == len(colours)
