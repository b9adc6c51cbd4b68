"""``import metaflowmaps`` is quick and needs none of the optional packages."""

import subprocess
import sys

HEAVY = ["torchvision", "diffusers", "transformers", "open_clip", "torch_fidelity", "gradio", "tensorboard", "ot"]
LAZY = ["matplotlib", "huggingface_hub", "pydantic", "typer"]


def test_import_without_the_optional_packages():
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(name + " is not installed")
sys.meta_path.insert(0, Refuse())
import metaflowmaps as mfm
for name in mfm.__all__:
    getattr(mfm, name)
import metaflowmaps.commands
print(mfm.__version__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_import_is_quick_and_light():
    """Under 2.5 s, the best of three; the packages that only some calls need are not loaded."""
    code = f"""
import sys, time
began = time.perf_counter()
import metaflowmaps
print(time.perf_counter() - began, *[name for name in {LAZY!r} if name in sys.modules])
"""
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        first, *loaded = done.stdout.split()
        assert loaded == []
        seconds.append(float(first))
    assert min(seconds) < 2.5
