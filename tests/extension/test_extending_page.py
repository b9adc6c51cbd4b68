"""The examples of docs/extending.md are the files that the tests beside this one run."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "extending.md"
EXAMPLES = ("my_method.py", "my_reward.py", "my_loss.py", "my_network.py", "my_data.py", "my_posterior.py")


def test_every_block_of_code_is_a_file_word_for_word():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert blocks == [(HERE / name).read_text() for name in EXAMPLES]


def test_every_name_in_its_commands_is_in_the_file_beside_it():
    for file, name in re.findall(r"\b(my_\w+\.py):(\w+)", PAGE.read_text()):
        assert re.search(rf"^(class|def) {name}\b|^{name} =", (HERE / file).read_text(), re.M), f"{file}:{name}"
