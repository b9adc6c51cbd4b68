"""Sequences: what contexts are drawn from them, how files are read, what is missing, what a map is fitted with."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from metaflowmaps.data import ContextLaw, Process, Sequences, Simulator
from metaflowmaps.data.paths import Paths
from metaflowmaps.data.sequence_files import read_sequences, stacked
from metaflowmaps.errors import InputError
from metaflowmaps.networks import ObservedConfig
from metaflowmaps.random import stream

N = 400


def counting(n=6, length=10, **law):
    """Paths whose values tell path and place: 100 · path + place."""
    values = (100.0 * torch.arange(n)[:, None] + torch.arange(length))[..., None]
    return Paths(values, torch.arange(length) / 2.0, ContextLaw(**law))


def drawn(paths):
    """x_1 (N,), observed values, times and mask (N, M), r (N,)."""
    x_1, context = paths.sample_given(N, stream(0, "given"))
    return x_1[:, 0], context.values[..., 0], context.times, context.mask, context.query


@pytest.mark.parametrize("place", ["any", "before", "latest"])
def test_contexts_and_their_target_are_of_one_path(place):
    x_1, values, times, mask, query = drawn(counting(place=place, lead=2))
    assert torch.equal(x_1 % 100, 2 * query)
    path = (x_1 // 100)[:, None].expand_as(values)
    assert torch.equal(values[mask], (100 * path + 2 * times)[mask])
    assert set((~mask).sum(1).tolist()) == {0, 1, 2, 3, 4}  # as many as there are, from none to four
    assert not bool((mask & (times == query[:, None])).any())
    if place != "any":
        assert bool((times < query[:, None])[mask].all())
    else:
        assert bool((times > query[:, None])[mask].any())


def test_the_latest_observations_follow_each_other_up_to_the_lead():
    _, _, times, mask, query = drawn(counting(place="latest", lead=2, least=1, most=3))
    assert set((2 * (query - times[:, 0]))[mask[:, 0]].tolist()) == {1.0, 2.0}
    steps = (times[:, :-1] - times[:, 1:])[mask[:, 1:]]
    assert set(steps.tolist()) == {0.5}


def test_a_window_without_enough_observations_is_not_asked_for():
    paths = counting(least=2, window=3)
    paths.values[:, 4] = torch.nan
    _, _, _, mask, query = drawn(paths)
    assert set(mask.sum(1).tolist()) == {2}
    assert set((2 * query).tolist()) == {0, 1, 7, 8, 9}  # of all others a window may hold the fourth


@pytest.mark.parametrize("place", ["before", "latest"])
def test_no_context_has_fewer_observations_than_asked_for(place):
    paths = counting(place=place, lead=3, least=2, window=6)
    paths.values[:, 4] = torch.nan
    mask = drawn(paths)[3]
    assert set(mask.sum(1).tolist()) <= {2, 3, 4}


def test_a_window_holds_the_whole_context():
    _, _, times, mask, query = drawn(counting(window=3))
    far = (times - query[:, None]).abs()[mask]
    assert set(far.tolist()) == {0.5, 1.0}


def test_every_place_is_asked_for_and_the_numbers_of_observations_are_uniform():
    _, _, _, mask, query = drawn(counting())
    assert set((2 * query).tolist()) == set(range(10))
    counts = torch.bincount(mask.sum(1), minlength=5)
    # binomial(400, 1/5): five standard deviations of 8
    assert bool(((counts - N / 5).abs() < 40).all())


def test_what_is_missing_is_neither_target_nor_observation():
    paths = counting()
    paths.values[:, ::3] = torch.nan
    x_1, values, times, mask, query = drawn(paths)
    assert bool(x_1.isfinite().all())
    assert bool(values.isfinite().all())
    assert not bool(((2 * times)[mask] % 3 == 0).any())
    assert not bool(((2 * query) % 3 == 0).any())


def test_paths_are_linear_between_what_was_seen():
    paths = counting(length=5)
    paths.values[1, 0], paths.values[1, 2] = torch.nan, torch.nan
    found = paths.at(torch.tensor([0, 1]), torch.tensor([[0.25, 9.0], [0.0, 1.25]]))[..., 0]
    # of path 1 the places 1, 3 and 4 were seen, at times .5, 1.5 and 2: its first stands for what was before
    assert found.tolist() == [[0.5, 4.0], [101.0, 102.5]]


def save(tmp_path, **arrays):
    file = tmp_path / ("paths.npz" if "times" in arrays else "paths.npy")
    if "times" in arrays:
        np.savez(file, **arrays)
    else:
        np.save(file, arrays["values"])
    return file


def test_files_are_read_with_their_times_in_order(tmp_path):
    values, times, _ = read_sequences(save(tmp_path, values=np.arange(12.0).reshape(3, 4)))
    assert values.shape == (3, 4, 1)
    assert times.tolist() == [0, 1, 2, 3]
    values, times, _ = read_sequences(save(tmp_path, values=np.arange(3.0), times=np.array([2.0, 0.5, 1.0])))
    assert values[0, :, 0].tolist() == [1, 2, 0]
    assert times.tolist() == [0.5, 1.0, 2.0]


def test_a_file_is_split_by_paths_and_a_single_path_by_time(tmp_path):
    many = Sequences(path=str(save(tmp_path, values=np.random.default_rng(0).normal(size=(20, 5)))))
    train, held = many.paths()
    assert (len(train), len(held)) == (18, 2)
    one = Sequences(path=str(save(tmp_path, values=np.arange(40.0), times=np.arange(40.0))), hold_out=0.25)
    train, held = one.paths()
    assert train.values.shape == (1, 30, 1)
    assert int(held.targets[:, 1].min()) == 30  # the end is asked for, given what was before


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"values": np.array([[1.0, np.nan]])}, "missing=mask"),
        ({"values": np.zeros((2, 1))}, "two times or more"),
        ({"values": np.zeros((2, 3)), "times": np.zeros(3)}, "the same time"),
        ({"values": np.zeros((2, 3)), "times": np.arange(2.0)}, "times must be finite"),
        ({"values": np.array(["a"])}, "cannot be read"),
        ({"data": np.zeros((2, 3)), "times": np.arange(3.0)}, "call the array"),
        ({"values": np.zeros((2, 3)), "times": 1.7e9 + np.arange(3.0)}, "count them from the first"),
        ({"values": np.full((2, 3), np.inf)}, "missing=mask"),
    ],
)
def test_files_that_are_no_sequences_are_refused(tmp_path, arrays, words):
    with pytest.raises(InputError, match=words):
        Sequences(path=str(save(tmp_path, **arrays))).paths()


def test_a_path_that_was_never_seen_is_left_out(tmp_path):
    values = np.random.default_rng(0).normal(size=(20, 5))
    values[3] = np.nan
    source = Sequences(path=str(save(tmp_path, values=values)), missing="mask")
    assert sum(map(len, source.paths())) == 19
    assert bool(source.fit(5).paths.isfinite().all())


def test_a_file_that_was_written_again_is_read_again(tmp_path):
    file = save(tmp_path, values=np.zeros((20, 5)))
    source = Sequences(path=str(file))
    assert float(source.paths()[0].values.sum()) == 0
    np.save(file, np.ones((20, 5)))
    os.utime(file, (1, 1))
    assert float(source.paths()[0].values.min()) == 1


def test_sequences_that_do_not_spread_are_refused(tmp_path):
    with pytest.raises(InputError, match="nothing to learn"):
        Sequences(path=str(save(tmp_path, values=np.ones((20, 5))))).fit(5)
    with pytest.raises(InputError, match="stationary=true"):
        Sequences(path=str(save(tmp_path, values=np.arange(40.0)))).fit(5)


def frames(folder, *lengths):
    """A folder of sequences whose pixels tell sequence and place: 50 · sequence + place."""
    for sequence, length in enumerate(lengths):
        (folder / f"s{sequence}").mkdir(parents=True)
        for place in range(length):
            pixels = np.full((6, 8), 50 * sequence + place, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"s{sequence}" / f"frame-{place}.png")
    return folder


def test_folders_of_pictures_are_sequences_of_frames(tmp_path):
    values, times, ends = read_sequences(frames(tmp_path / "many", 12, 3), size=4)
    assert values.shape == (2, 12, 1, 4, 4)
    assert times.tolist() == list(range(12))
    assert ends.tolist() == [12, 3]
    level = (values[..., 0, 0, 0] + 1) * 127.5
    torch.testing.assert_close(level[0], torch.arange(12.0), atol=1e-4, rtol=0)  # frame-2 before frame-10
    assert level[1].isfinite().tolist() == [True] * 3 + [False] * 9
    # what a shorter sequence does not have is no mistake
    train, held = Sequences(path=str(tmp_path / "many"), size=4).paths()
    assert {len(train), len(held)} == {1}


def test_videos_are_refused_with_what_unpacks_them(tmp_path):
    (frames(tmp_path / "videos", 3) / "one.mp4").touch()
    with pytest.raises(InputError, match=r"ffmpeg -i one\.mp4"):
        read_sequences(tmp_path / "videos")
    with pytest.raises(InputError, match=r"ffmpeg -i one\.mp4"):
        read_sequences(tmp_path / "videos" / "one.mp4")


def test_sequences_one_after_the_other_are_stacked():
    held = stacked((torch.full((n, 2), float(n)) for n in (3, 5)), "a generator")
    assert held.values.shape == (2, 5, 2)
    assert held.values[0, :, 0].isfinite().tolist() == [True, True, True, False, False]
    for wrong, words in (([torch.zeros(3, 2), torch.zeros(3, 1)], "events alike"), ([], "holds 0 sequences")):
        with pytest.raises(InputError, match=words):
            stacked(wrong, "a generator")


def test_a_simulator_is_called_once_for_each_part():
    calls = []

    def simulate(n, generator):
        calls.append(n)
        theta = torch.randn(n, 2, generator=generator)
        return theta, torch.cat([theta, 100 * theta], 1)

    source = Simulator(simulate=simulate, num=50)
    source.event_shape(), source.network_options(), source.samples(), source.held_out()
    network = ObservedConfig(width=8, heads=2, **source.network_options()).network((2,))
    network.fit(*source.fit(1))
    assert calls == [50, 6]
    # each number of x has a spread of its own
    torch.testing.assert_close(network.seen_std[2:], 100 * network.seen_std[:2])


@pytest.mark.parametrize(
    ("simulate", "words"),
    [
        (lambda n, g: torch.zeros(n, 2), r"return \(θ, x\)"),
        (lambda n, g: (torch.zeros(n), torch.zeros(n, 1)), r"θ \(n, d\)"),
        (lambda n, g: (torch.zeros(n, 1), torch.full((n, 1), torch.nan)), "let simulate leave"),
        (lambda n, g: (torch.zeros(n, 1), torch.zeros(n, 1)), "leave it out"),
    ],
)
def test_simulations_that_are_no_pairs_are_refused(simulate, words):
    with pytest.raises(InputError, match=words):
        Simulator(simulate=simulate, num=10).fit(1)


def test_parameters_of_unlike_spreads_are_warned_of():
    source = Simulator(simulate=lambda n, g: (torch.randn(n, 2) * torch.tensor([1.0, 1e3]), torch.zeros(n, 1)), num=50)
    with pytest.warns(UserWarning, match="spread alike"):
        source.fit(1)


def test_sequences_without_a_file_and_impossible_laws_are_refused():
    with pytest.raises(InputError, match="--data FILE"):
        Sequences().paths()
    with pytest.raises(ValueError, match="more than most"):
        ContextLaw(least=5, most=4)
    with pytest.raises(InputError, match=r"data\.options"):
        Process(process="ou", options={"speed": 1.0}).paths()
    with pytest.raises(InputError, match=r"--data file\.py:name"):
        Simulator().pairs()


def test_a_stationary_source_counts_times_from_what_is_asked_for():
    source = Process(process="ou", stationary=True, contexts=ContextLaw(place="before", window=5), num=200)
    nodes, paths, least, _ = source.fit(source.network_options()["nodes"])
    assert nodes.tolist() == [-0.5, -0.375, -0.25, -0.125, 0.0]
    assert paths.shape[1:] == (5, 1)
    assert least == 0


def test_a_simulator_gives_pairs():
    source = Simulator(simulate=lambda n, g: (torch.arange(n).float()[:, None], torch.arange(n).float()[:, None] * 2))
    x_1, context = source.samples().sample_given(8, stream(0, "pairs"))
    assert torch.equal(context.values[:, 0], 2 * x_1)
    assert source.network_options() == {
        "max_observations": 1,
        "stationary": False,
        "nodes": 1,
        "observed_shape": (1,),
    }
