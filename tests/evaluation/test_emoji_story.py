"""The story of emoji, small: a figure, a table and costs for each of its rewards."""

import pytest

from metaflowmaps.lab.emoji_story import CHAPTERS, EmojiStoryConfig, tell_emoji_story
from metaflowmaps.lab.opened import OpenedModel


@pytest.mark.attack  # 15 s: every method on three rewards
def test_the_story_of_emoji(tmp_path):
    said = []
    config = EmojiStoryConfig(samples=2, steps=4, best_of=2)
    told = tell_emoji_story(OpenedModel.open("emoji", "cpu"), config, tmp_path, said.append)
    assert {file.name for file in tmp_path.glob("*.png")} == {f"story-{c.name}.png" for c in CHAPTERS}
    assert told["captions"].keys() == {f"story-{c.name}.png" for c in CHAPTERS}
    for chapter, table in zip(CHAPTERS, told["tables"].values(), strict=True):
        methods = told["rewards"][chapter.reward]
        assert [row[0] for row in table["rows"]] == list(methods)
        assert any(chapter.wanted in line for line in said)
        # a call a step; a call and a reward of each of two candidates
        assert methods["unsteered"]["nfe"] == 4
        assert methods["best of 2"]["nfe"] == 4
