"""The README's snippets work, and print what the README says."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx

from hwbp_compiler import backend, options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    """All snippets as one file, in a directory of their own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.py"
    path.write_text("\n".join(blocks("python")))
    return path


def without_estimates(text: str) -> str:
    """Remove times, which depend on the machine, node counts, which depend on details of the passes, and line ends."""
    return re.sub(r"[\d.]+ ms|[\d.]+x|[\d.]+ [kM]B|\d+ nodes|\d+ after", "#", " ".join(text.split()))


def assert_prints_what_the_readme_says(output: str) -> None:
    (shown,) = blocks("text")
    assert without_estimates(shown.strip()) in without_estimates(output)


def test_the_snippets_run(script, monkeypatch, capsys):
    """Inductor's graphs run without code generation, to save time."""

    def no_code(module, example_inputs, **kwargs):
        return make_boxed_func(module.forward)

    def compile_(gm, inputs, patches, inner_compile=no_code):
        return compile_fx(gm, inputs, inner_compile=inner_compile, config_patches=dict(patches))

    monkeypatch.setattr(backend, "compile_fx", compile_)
    found = runpy.run_path(str(script))
    assert_prints_what_the_readme_says(capsys.readouterr().out)
    assert all(parameter.grad is not None for parameter in found["model"].parameters())
    assert "<details" in Path("report.html").read_text()


@pytest.mark.slow
def test_the_snippets_run_in_a_process_of_their_own(script):
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_prints_what_the_readme_says(done.stdout)


def test_every_option_is_in_the_table_with_its_default():
    for name, default in options._DEFAULTS.items():
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
        assert row.split("|")[3].strip(" `") == shown


def test_every_file_linked_to_is_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) > 3
    assert [link for link in links if not (ROOT / link).exists()] == []
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
