"""The examples of docs/extending.md are the files that the tests beside this one run."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "extending.md"
NAMES = ("my_method", "my_mover", "my_reward", "my_loss", "my_network", "my_data", "my_posterior")


def test_every_block_of_code_is_a_file_word_for_word():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert blocks == [(HERE / f"{name}.py").read_text() for name in NAMES]


def test_every_name_in_its_commands_is_in_the_file_beside_it():
    for file, name in re.findall(r"\b(my_\w+\.py):(\w+)", PAGE.read_text()):
        assert re.search(rf"^(class|def) {name}\b|^{name} =", (HERE / file).read_text(), re.M), f"{file}:{name}"
