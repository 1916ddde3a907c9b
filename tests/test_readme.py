"""README is short, its code works, and its links lead somewhere."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import snippets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    """All code blocks as one file, in a separate directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.py"
    path.write_text("\n".join(snippets.blocks(README, "python")))
    return path


def test_the_snippets_run(script, monkeypatch, capsys):
    snippets.without_generated_code(monkeypatch)
    found = runpy.run_path(str(script))
    assert "1 chain in 1 joint graph" in capsys.readouterr().out
    assert all(parameter.grad is not None for parameter in found["model"].parameters())
    assert "<details" in Path("report.html").read_text()


@pytest.mark.slow
def test_the_snippets_run_in_a_process_of_their_own(script):
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_has_fewer_than_200_lines_and_a_table_of_at_most_twelve_results():
    assert len(README.splitlines()) < 200
    results = README.partition("<!-- results")[2].partition("<!-- end of results")[0]
    assert 6 < len([line for line in results.splitlines() if line.startswith("|")]) - 2 <= 12


def test_installing_is_the_second_thing_on_the_page():
    assert re.findall(r"^#+ (.*)", README, re.MULTILINE)[:2] == ["hwbp_compiler", "Install"]


def test_every_example_has_a_line():
    examples = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")}
    helpers = {"data.py", "training.py"}
    assert {name for name in examples - helpers if f"- [{name}](examples/{name}): " not in README} == set()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "examples/README.md", "CHANGELOG.md"])
def test_every_file_and_heading_linked_to_is_there(name):
    page = ROOT / name
    dead = []
    for target, anchor in snippets.links(page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or anchor and anchor not in snippets.anchors(file.read_text(encoding="utf-8")):
            dead.append(f"{target}#{anchor}")
    assert dead == []


def test_every_make_target_it_names_is_there():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`make (\S+)`", README)
    assert len(targets) > 1
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
