"""What is built from the sources: a wheel and an sdist that are whole, and a path to edit."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import lora_inject

pytestmark = pytest.mark.cpu("it is about files")

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools")
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def sources(tmp_path):
    """A copy of the sources, in which builders may leave what they like."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lora_inject", tmp_path / "lora_inject", ignore=ignored)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    return tmp_path


def built(sources, *kinds):
    """What setuptools builds there: the paths of the files."""
    hooks = "".join(f"print(build_meta.build_{kind}('dist')); " for kind in kinds)
    code = f"from setuptools import build_meta; {hooks}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=sources)
    assert done.returncode == 0, done.stderr
    return sorted((sources / "dist").iterdir())


def test_the_wheel_and_the_sdist_are_whole(sources):
    wheel, sdist = built(sources, "wheel", "sdist")
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lora_inject").rglob("*.py")}
    expected |= {"lora_inject/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        code = {name for name in names if ".dist-info/" not in name}
        assert {name for name in code if not name.endswith(".md")} == expected
        archive.extractall(sources / "unpacked")
    (info,) = (sources / "unpacked").glob("*.dist-info")
    said = PathDistribution(info).metadata
    assert said["Version"] == lora_inject.__version__
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert expected | {*FILES} <= inside


def test_type_checkers_follow_an_editable_install(sources, tmp_path_factory):
    pytest.importorskip("mypy")
    (wheel,) = built(sources, "editable")
    place = tmp_path_factory.mktemp("elsewhere")
    venv.create(place / "venv", symlinks=True)
    (packages,) = (place / "venv").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (path,) = packages.glob("*.pth")
    assert path.read_text().strip() == str(sources)  # no hook at import, which they do not run
    user = place / "user.py"
    user.write_text("from lora_inject import strip\n\nreveal_type(strip)\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", place / "venv/bin/python"]
    environment = {key: v for key, v in os.environ.items() if not key.endswith("PATH")} | {
        "PATH": os.environ["PATH"]
    }
    done = subprocess.run(
        [*command, "--cache-dir", place / "cache", user.name],
        capture_output=True, text=True, cwd=place, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert 'Revealed type is "def [Model' in done.stdout  # found, and typed
