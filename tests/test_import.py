"""``import metaflowmaps`` is light and needs none of the optional packages."""

import re
import subprocess
import sys
from pathlib import Path

HEAVY = ["torchvision", "diffusers", "transformers", "open_clip", "torch_fidelity", "gradio", "tensorboard", "ot"]


ELSEWHERE = ["resource", "fcntl"]  # are not there on Windows


def test_import_without_the_optional_packages(tmp_path):
    """Nor without what other systems lack, nor where the distribution's metadata are not: a checkout on PYTHONPATH."""
    code = f"""
import importlib.metadata, sys
import torch  # asks for some of them itself
for name in {ELSEWHERE!r}:
    sys.modules.pop(name, None)
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {[*HEAVY, *ELSEWHERE]!r}:
            raise ImportError(name + " is not installed")
sys.meta_path.insert(0, Refuse())
version, importlib.metadata.version = importlib.metadata.version, missing
import metaflowmaps as mfm
for name in mfm.__all__:
    getattr(mfm, name)
from metaflowmaps.cli.app import COMMANDS
for module in COMMANDS.values():
    __import__("metaflowmaps.cli." + module)
importlib.metadata.version = version
from pathlib import Path
from metaflowmaps._files import lock
from metaflowmaps.cost import Meter
assert lock(Path({str(tmp_path / "lock")!r})) is not None
with Meter() as meter:
    pass
print(mfm.__version__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_import_brings_nothing_else():
    """Beside torch, numpy and safetensors no package is loaded: pydantic is for options and networks that are read.

    Nothing at all before a name is asked for: so ``mfm --help`` is there at once, and Ctrl-C in its first seconds meets
    nobody's import. And data bring no Pillow, which is for those that are pictures.
    """
    code = """
import sys
import metaflowmaps as mfm
assert "torch" not in sys.modules, "torch"
assert {"steer", "finetune", "Pipeline"} <= set(dir(mfm))
import numpy, safetensors.torch, torch
before = set(sys.modules)
assert mfm.MetaFlowMap.__module__ == "metaflowmaps.flow_map"
mfm.steer
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(name for name in new - set(sys.stdlib_module_names) if not name.startswith("_")))
import metaflowmaps.data
print("PIL" in sys.modules)
try:
    mfm.stear
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new, pillow, error = done.stdout.splitlines()
    assert (new, pillow) == ("metaflowmaps", "False")
    assert "'stear'" in error


def test_no_private_name_of_torch_is_used():
    """They change without notice: none, and so no upper bound on torch."""
    private = re.compile(r"\btorch(\.\w+)*\._[a-z]|from torch\S* import _")
    sources = sorted((Path(__file__).parents[1] / "src").rglob("*.py"))
    assert len(sources) > 100
    assert [str(file) for file in sources if private.search(file.read_text(encoding="utf-8"))] == []
