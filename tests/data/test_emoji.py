"""The emoji that come with the package: what they are, what is held out, and mirrors."""

import torch

from metaflowmaps.data import Emoji
from metaflowmaps.data.emoji import EMOJI_FILE, WRITTEN
from metaflowmaps.recipes import recipe

MAX_BYTES = 4_000_000  # of the wheel


def test_emoji_are_pictures_in_colour_with_categories_and_names():
    train, held_out = Emoji().load()
    assert (len(train), len(held_out)) == (3050, 338)
    assert train.event_shape == (3, 32, 32)
    x = train.tensor(slice(500))
    assert x.min() >= -1
    assert x.max() <= 1
    assert (x[:, :, 0] == 1).float().mean() > 0.8  # a white border above most
    assert (x[:, 0] - x[:, 2]).abs().max() > 1  # red and blue differ
    assert len(train.class_names) == 9
    named = zip(train.names, train.labels.tolist(), strict=True)
    smiling = [train.class_names[label] for name, label in named if "smil" in name]
    assert len(smiling) >= 8
    assert set(smiling) <= {"Smileys & Emotion", "Animals & Nature", "People & Body"}


def test_emoji_are_small_and_their_licence_is_beside_them():
    assert EMOJI_FILE.stat().st_size <= MAX_BYTES
    text = EMOJI_FILE.with_name("emoji-licence.txt").read_text()
    assert "MIT License" in text
    assert "Copyright (c) Microsoft Corporation" in text


def test_a_mirror_spares_flags_and_symbols_and_what_is_held_out():
    train, held_out = Emoji().load()
    written = torch.tensor([name in WRITTEN for name in train.class_names])[train.labels]
    assert torch.equal(train.flip, ~written)
    index = torch.arange(len(train))
    drawn, stored = train._drawn(index, torch.Generator().manual_seed(0)), train.tensor()
    same = (drawn == stored).flatten(1).all(1)
    assert same[written].all()
    assert torch.equal(drawn[~same], stored[~same].flip(3))
    # about half: 4 deviations of a coin of 2,600 throws are .04; a few pictures are their own mirrors
    assert 0.45 < same[~written].float().mean() < 0.56
    every = torch.arange(len(held_out))
    assert torch.equal(held_out._drawn(every, torch.Generator().manual_seed(0)), held_out.tensor())
    plain = Emoji(mirrored=False).load()[0]
    assert torch.equal(plain._drawn(index, torch.Generator().manual_seed(0)), stored)


def test_the_same_generator_draws_the_same_emoji_with_or_without_labels():
    train, _ = Emoji(labels=True).load()
    x, labels = train.sample_labelled(20, torch.Generator().manual_seed(3))
    assert torch.equal(x, train.sample(20, torch.Generator().manual_seed(3)))
    assert labels.max() < 9


def test_recipes_of_emoji_are_whole():
    for name in ("emoji", "emoji-guide", "emoji-judge"):
        for fast in (True, False):
            config = recipe(name, fast)
            assert config.recipe == name
            assert config.data == Emoji(labels=True)
    guide, judge = (recipe(f"emoji-{role}").network for role in ("guide", "judge"))
    assert type(guide) is not type(judge)
