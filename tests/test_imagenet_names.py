"""ImageNet's classes: 1,000 in the order of their ids, found by number, id or any name."""

import pytest

from metaflowmaps.errors import InputError
from metaflowmaps.imagenet_names import class_index, class_name, class_names, wnids


def test_a_thousand_classes_in_the_order_of_their_ids():
    assert len(wnids()) == len(class_names()) == 1000
    assert list(wnids()) == sorted(set(wnids()))
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdecimal() for wnid in wnids())
    # numbers that are printed in many places
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby cat", 388: "giant panda", 417: "balloon"}
    known |= {604: "hourglass", 972: "cliff", 985: "daisy", 999: "toilet tissue"}
    assert {class_index(name): name for name in known.values()} == known


def test_every_way_to_name_a_class():
    ways = (281, "281", "n02123045", "tabby", "Tabby  CAT", "tabby_cat", "tabby, tabby cat")
    assert {class_index(way) for way in ways} == {281}
    assert class_name(281) == "tabby, tabby cat"
    for index, (wnid, names) in enumerate(zip(wnids(), class_names(), strict=True)):
        assert class_index(wnid) == index
        for name in names.split(", "):
            if sum(name.lower() in known.lower().split(", ") for known in class_names()) == 1:
                assert class_index(name) == index
                continue
            with pytest.raises(InputError, match=rf"\b{index} \("):
                class_index(name)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("crane", r"134 \(n02012849, crane\) or 517 \(n03126707, crane\)"),
        ("maillot", r"638 .* or 639 .*tank suit"),
        ("tabby cta", "did you mean 'tabby cat'"),
        ("qqqq", "a number from 0 to 999"),
        ("", "a number from 0 to 999"),
        (1000, "0 to 999"),
        ("-1", "0 to 999"),
        (True, "True"),
    ],
)
def test_what_means_no_class_or_two(given, said):
    with pytest.raises(InputError, match=said) as caught:
        class_index(given)
    assert "\n" not in str(caught.value)


def test_other_lists_of_names():
    names = ("10", "2", "sea otter, otter", "otter hound")
    assert class_index("10", names) == 0  # a name before a number
    assert class_index("1", names) == 1
    assert class_index(1, names) == 1
    assert class_index("Otter", names) == 2
    assert class_name(3, names) == "otter hound"
    with pytest.raises(InputError, match="did you mean 'otter hound'"):
        class_index("otterhoun", names)
    with pytest.raises(InputError, match="0 to 3"):
        class_name(4, names)
    with pytest.raises(InputError, match="unknown class 'n02123045'"):
        class_index("n02123045", names)
