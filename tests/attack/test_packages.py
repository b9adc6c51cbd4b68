"""What pip installs: an sdist and a wheel of the same files, with all that is needed and all imports declared."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_WHEEL_BYTES = 16 * 2**20  # the emoji's 4, their map's 5 and 4 of the other shipped ones, and a quarter more
# pydantic pins its core to itself; a kernel that shows figures has IPython, and nothing else asks for it
WITH_OTHERS = {"pydantic-core", "ipython"}
NORMAL = re.compile(r"[-_.]+")


@pytest.mark.attack
def test_everything_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    declared = {NORMAL.sub("-", re.split(r"[<>=\[;]", line)[0]).lower() for line in project["dependencies"] + extras}
    known, undeclared = packages_distributions(), {}
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in {name.partition(".")[0] for name in names} - {"metaflowmaps"} - sys.stdlib_module_names:
                owners = {NORMAL.sub("-", owner).lower() for owner in known.get(name, [name])}
                if not owners & (declared | WITH_OTHERS):
                    undeclared.setdefault(name, file.name)
    assert undeclared == {}


def run(*words: object, cwd: Path) -> str:
    """A command's output, in an environment that knows nothing of this checkout."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MFM_", "COV"))}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=known, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, the wheel of the checkout in ``direct`` and that of the sdist in ``again``."""
    out = tmp_path_factory.mktemp("dist")
    venv.create(out / "builder", with_pip=True)
    python = out / "builder/bin/python"
    run(python, "-m", "pip", "install", "-q", "hatchling>=1.27", cwd=out)
    run(python, "-m", "hatchling", "build", "-t", "sdist", "-d", out, cwd=ROOT)
    run(python, "-m", "hatchling", "build", "-t", "wheel", "-d", out / "direct", cwd=ROOT)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        held.extractall(out, filter="data")
    run(python, "-m", "hatchling", "build", "-t", "wheel", "-d", out / "again", cwd=out / archive.name[:-7])
    return out


@pytest.mark.attack
def test_the_sdist_makes_the_same_wheel(dist: Path):
    (direct,), (again,) = (dist / "direct").glob("*.whl"), (dist / "again").glob("*.whl")
    assert direct.stat().st_size < MAX_WHEEL_BYTES
    with zipfile.ZipFile(direct) as one, zipfile.ZipFile(again) as other:
        assert {i.filename: i.CRC for i in one.infolist()} == {i.filename: i.CRC for i in other.infolist()}
        names = one.namelist()
        (metadata,) = [one.read(name).decode() for name in names if name.endswith("METADATA")]
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "src/metaflowmaps"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name.removeprefix("src/") for name in tracked} <= set(names)
    assert {Path(name).name for name in names if "dist-info/licenses" in name} == {"LICENSE", "emoji-licence.txt"}
    head = metadata.partition("\n\n")[0]
    assert "License-Expression: Apache-2.0 AND MIT" in head
    assert "http" not in head  # no address before there is a public one
    assert "Requires-Python: >=3.11" in head


@pytest.mark.attack
def test_the_wheel_works_in_an_environment_of_its_own(dist: Path, tmp_path: Path):
    """The dependencies are those of this suite: torch is not fetched again."""
    venv.create(tmp_path / "env", with_pip=True)
    python, mfm = tmp_path / "env/bin/python", tmp_path / "env/bin/mfm"
    (wheel,) = (dist / "direct").glob("*.whl")
    run(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    site = tmp_path / f"env/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # found after its own
    place = run(python, "-c", "import metaflowmaps; print(metaflowmaps.__file__)", cwd=tmp_path)
    assert place.strip() == str(site / "metaflowmaps/__init__.py")
    version = run(mfm, "--version", cwd=tmp_path).strip()
    assert wheel.name == f"metaflowmaps-{version}-py3-none-any.whl"
    assert "value and gradient" in run(mfm, "doctor", cwd=tmp_path)
    run(mfm, "steer", "digits", "--reward", "ink", "--num", "4", "--steps", "5", "--out", "s", cwd=tmp_path)
    run(mfm, "report", "s", cwd=tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    loaded = "import metaflowmaps as mfm; print(tuple(mfm.load_samples('s').samples.shape))"
    assert run(python, "-c", loaded, cwd=tmp_path).strip() == "(4, 1, 8, 8)"
