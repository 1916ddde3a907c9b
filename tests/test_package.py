"""The wheel and the sdist work without the checkout, each in its own environment.

The environment links to all packages that are installed here except this one, so that nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import hwbp_compiler

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("hwbp_compiler", "passes", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_sdist(to); b.build_wheel(to)"


def run(*command: object, cwd: Path) -> str:
    # Through PYTHONPATH pip would see this checkout, and take the release for installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> dict[str, Path]:
    """The wheel and the sdist, built from a copy of the files in git, because a build leaves folders behind."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-c", BUILD, built, cwd=source)
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def install(releases, tmp_path_factory):
    """Maps "wheel" or "sdist" to a Python that has it installed, and otherwise the same packages as this Python."""
    made: dict[str, Path] = {}

    def installed(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
            python = folder / "bin" / "python"
            place = Path(
                run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
            )
            for package in Path(torch.__file__).parents[1].iterdir():
                if "hwbp" not in package.name and package.name != "__pycache__" and package.suffix != ".pth":
                    (place / package.name).symlink_to(package)
            pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps"]
            run(*pip, "--no-build-isolation", releases[kind], cwd=folder)
            made[kind] = python
        return made[kind]

    return installed


CLEAN = """
import importlib.metadata, importlib.util, json, pathlib, sys
import torch
from torch import nn

known = "highway" in torch._dynamo.list_backends()
imported = "hwbp_compiler" in sys.modules  # listing backends loads none of them
import hwbp_compiler, hwbp_compiler.passes

model = nn.GRU(3, 4, num_layers=2)
report = hwbp_compiler.explain(model, torch.randn(6, 2, 3), options={"iterations": 1, "rewrite": "always"})
report.to_html("report.html")
print(json.dumps({
    "known": known, "imported": imported, "version": hwbp_compiler.__version__,
    "metadata": importlib.metadata.version("hwbp_compiler"),
    "files": [hwbp_compiler.__file__, hwbp_compiler.passes.__file__],
    "printed": str(report), "page": pathlib.Path("report.html").read_text()[:15],
}))
"""


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installed_release_is_found_by_torch_and_explains(kind, install, tmp_path):
    python = install(kind)
    found = json.loads(run(python, "-I", "-c", CLEAN, cwd=tmp_path).splitlines()[-1])
    assert found["known"] and not found["imported"]
    assert found["version"] == found["metadata"] == hwbp_compiler.__version__
    assert all(Path(file).is_relative_to(python.parents[1]) for file in found["files"])
    assert "2 chains alike (1 and 2)" in found["printed"]
    assert found["page"] == "<!DOCTYPE html>"


def test_the_wheel_holds_every_file_of_the_package(releases):
    kept = {*zipfile.ZipFile(releases["wheel"]).namelist()}
    modules = [("hwbp_compiler", ROOT / "hwbp_compiler"), ("hwbp_compiler/passes", ROOT / "passes")]
    wanted = {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in modules
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert wanted <= kept
    assert {
        "hwbp_compiler/py.typed",
        "hwbp_compiler/scan/linear_scan.cpp",
        "hwbp_compiler/passes/pipeline.py",
    } <= wanted


def test_the_sdist_holds_what_the_wheel_is_built_from_and_the_changelog(releases):
    with tarfile.open(releases["sdist"]) as archive:
        kept = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "README.md", "LICENSE", "pyproject.toml", "passes/__init__.py"} <= kept
    assert {"hwbp_compiler/report/page.html", "hwbp_compiler/recurrence/gru.cpp", "hwbp_compiler/py.typed"} <= kept
    assert not any(name.startswith("tests") for name in kept)


def test_the_changelog_begins_with_this_version():
    (first, *_) = re.findall(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())
    assert first == hwbp_compiler.__version__


CLIENT = """
import hwbp_compiler
from hwbp_compiler import {names}

reveal_type(hwbp_compiler.__version__)
{revealed}
hwbp_compiler.explain(len, options=3)
"""
MYPY = """
[mypy]
[mypy-torch.*]
follow_imports = skip
ignore_missing_imports = true
"""


def test_a_client_of_the_wheel_is_checked_against_types(install, tmp_path):
    pytest.importorskip("mypy")
    names = hwbp_compiler.__all__
    revealed = "\n".join(f"reveal_type({name})" for name in names)
    (tmp_path / "client.py").write_text(CLIENT.format(names=", ".join(names), revealed=revealed))
    (tmp_path / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--python-executable", install("wheel"), "client.py"]
    done = subprocess.run([str(word) for word in command], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    types = re.findall(r'client\.py:\d+: note: Revealed type is "(.*)"', done.stdout)
    assert len(types) == len(names) + 1, done.stdout + done.stderr
    assert "Any" not in types and types[0] == "str"
    errors = re.findall(r"(\S+): error: (.*)", done.stdout)
    assert [place for place, _ in errors] == [f"client.py:{len(names) + 6}"], done.stdout
    assert '"options" to "explain" has incompatible type "int"' in errors[0][1]
