"""Choices: names in, objects out, and back again; what stands outside the package is a choice like any other."""

from abc import ABC
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from metaflowmaps.errors import InputError
from metaflowmaps.losses import Eulerian, Lagrangian
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.work.choices import Choice, Pick, build, built, choose, dumped, outside, spelled
from metaflowmaps.work.config import Config, merged, override, validated


class Fruit(Choice, ABC):
    """A family, for these tests."""


@dataclass(frozen=True)
class Apple(Fruit):
    """A member; not of the package, so it is spelled by where it stands."""

    name = "apple"
    weight: float = 1.0
    ripe: bool = True


class Basket(Config):
    """A configuration that holds a choice."""

    fruit: Annotated[Fruit, Pick(Fruit)] = Apple()


MY_PEAR = """
from dataclasses import dataclass
from test_choices import Fruit

@dataclass(frozen=True)
class Pear(Fruit):
    name = "pear"
    juice: int = 3
"""


@pytest.fixture
def pear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(__import__("sys").modules, "test_choices", __import__("sys").modules[__name__])
    (tmp_path / "my.py").write_text(MY_PEAR)
    return f"{tmp_path / 'my.py'}:Pear"


def test_a_choice_from_a_file_comes_back_from_its_dump(pear: str) -> None:
    made = build(Fruit, pear, {"juice": "5"})
    assert made.juice == 5  # type: ignore[attr-defined]
    assert dumped(made) == {"name": pear, "juice": 5}
    assert built(Fruit, dumped(made)) == made
    assert choose(Fruit, spelled(type(made))) is type(made)


def test_a_field_takes_the_object_its_name_or_its_dump(pear: str) -> None:
    basket = validated(Basket, {"fruit": {"name": pear, "juice": 2}})
    assert basket.fruit.juice == 2  # type: ignore[attr-defined]
    assert validated(Basket, basket.model_dump()) == basket
    assert validated(Basket, {"fruit": pear}).fruit.juice == 3  # type: ignore[attr-defined]


def test_settings_change_an_option_or_the_choice(pear: str) -> None:
    assert override(Basket(), ["fruit.weight=2"]).fruit == Apple(weight=2)
    changed = override(Basket(), [f"fruit={pear}", "fruit.juice=7"])
    assert changed.fruit.juice == 7  # type: ignore[attr-defined]


def test_wrong_options_and_names_are_one_line_with_the_nearest(pear: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'juice'"):
        build(Fruit, pear, {"juise": 1})
    with pytest.raises(InputError, match="did you mean 'weight'"):
        override(Basket(), ["fruit.wheight=2"])
    with pytest.raises(InputError, match="bad value for juice"):
        build(Fruit, pear, {"juice": "many"})
    with pytest.raises(InputError, match="there is no file"):
        choose(Fruit, f"{tmp_path / 'none.py'}:Pear")
    with pytest.raises(InputError, match="did you mean 'Pear'"):
        choose(Fruit, pear.replace(":Pear", ":Peer"))
    with pytest.raises(InputError, match="is no fruit"):
        choose(Fruit, "pathlib:Path")
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(InputError, match="division by zero"):
        choose(Fruit, f"{tmp_path / 'broken.py'}:Pear")


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("@dataclass\nclass Plum(Fruit):\n    size: int = 1", 'Plum has no name: write name = "…"'),
        ("class Plum(Fruit):\n    name = 'plum'", r"write @dataclass\(frozen=True\) above the class"),
        ("@dataclass\nclass Plum(Fruit):\n    name = 'plum'\n    @abstractmethod\n    def eat(self): 0", "has no eat"),
    ],
    ids=["no name", "no dataclass", "no method"],
)
def test_a_class_that_lacks_something_is_told_what(pear: str, tmp_path: Path, written: str, says: str) -> None:
    """Typed or, where Python lets it be made, passed as an object."""
    head = "from abc import abstractmethod\nfrom dataclasses import dataclass\nfrom test_choices import Fruit\n\n"
    (tmp_path / "plum.py").write_text(head + written + "\n")
    with pytest.raises(InputError, match=says):
        choose(Fruit, f"{tmp_path / 'plum.py'}:Plum")
    if "abstract" not in written:
        with pytest.raises(InputError, match=says):
            built(Fruit, outside(f"{tmp_path / 'plum.py'}:Plum")())


def test_a_group_given_in_part_keeps_the_rest_when_its_name_changes_and_a_choice_begins_anew():
    """The optimiser is a group of settings, whatever its name; a loss of another name is another object."""
    config = override(gmm(), ["optimizer.clip=7", "loss.consistency.name=lagrangian", "loss.consistency.h=0.01"])
    assert merged(config, {"optimizer": {"name": "adam"}}).optimizer.clip == 7
    assert merged(config, {"loss.consistency": {"velocity": "self"}}).loss.consistency == Lagrangian(
        velocity="self", h=0.01
    )
    assert merged(config, {"loss.consistency": {"name": "eulerian"}}).loss.consistency == Eulerian()
