"""``python -m hwbp_compiler``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hwbp_compiler import doctor
from hwbp_compiler.__main__ import main

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.relu(self.linear(x))

def positional():
    return nn.Sequential(*(Block() for _ in range(5))), torch.ones(2, 4)

def by_keyword():
    return (lambda *, x: positional()[0](x)), {"x": torch.ones(2, 4)}, lambda output: output.square().sum()

def nothing():
    return nn.Linear(2, 2), "inputs"

def without_reduction():
    return *positional(), lambda output: output

def of_width(width):
    return positional()

def the_model_alone():
    return positional()[0]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "a_model.py").write_text(MODEL)
    yield tmp_path
    sys.modules.pop("a_model", None)


@pytest.mark.parametrize("place", ["a_model:positional", "a_model.py:positional"])
def test_explain_writes_what_it_is_asked_for(folder, capsys, place):
    arguments = ["--html", "out.html", "--json", "out.json", "--repro", "out.py"]
    assert main(["explain", place, "-o", "iterations=1", "-o", "rewrite=always", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "chain 1: 5 links, rewritten" in printed and "a_model.py:11" in printed
    assert '<svg class="chain"' in (folder / "out.html").read_text()
    (chain,) = json.loads((folder / "out.json").read_text())["chains"]
    assert chain["length"] == 5 and chain["decision"] == "rewritten"
    assert "class JointGraph" in (folder / "out.py").read_text()


def test_inputs_by_keyword_and_a_loss(folder, capsys):
    assert main(["explain", "a_model:by_keyword", "-o", "iterations=1"]) == 0
    assert "5 links" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a_model:the_model_alone"], "returned Sequential; it must return (model, inputs)"),
        (["no_such_module:f"], "cannot be imported"),
        (["no_such_file.py:f"], "no file"),
        (["a_model:no_such_function"], "it has Block, by_keyword, nothing, of_width, positional, "),
        (["a_model"], "names no function"),
        (["a_model:nothing"], "the inputs are a str"),
        (["a_model:Block.forward"], "has no function 'Block.forward'"),
        (["a_model:of_width"], "cannot be called without arguments: missing a required argument: 'width'"),
        (["a_model:positional", "--html", "no/such/folder/a.html"], "folder that does not exist"),
        (["a_model:positional", "--draw", "a.pdf"], "must end in one of .dot, .svg, .png"),
        (["a_model:without_reduction"], "loss(output) is a tensor of shape (2, 4); it must be one number: reduce it"),
        (["a_model:positional", "-o", "iterations"], "has no value"),
        (["a_model:positional", "-o", "iterations=-1"], "iterations"),
        (["a_model:positional", "-o", "iteration=1"], "Did you mean 'iterations'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_else_and_the_status_is_2(folder, capsys, arguments, said):
    assert main(["explain", *arguments]) == 2
    told = capsys.readouterr()
    assert said in told.err and told.out == ""


def test_a_missing_program_is_told_before_the_work(folder, capsys, monkeypatch):
    pytest.importorskip("pydot")
    monkeypatch.setenv("PATH", "")
    assert main(["explain", "a_model:positional", "--draw", "a.svg"]) == 2
    told = capsys.readouterr()
    assert "`dot` on the PATH (apt-get install graphviz)" in told.err and told.out == ""


def test_where_there_is_no_graph_the_report_is_printed_and_the_status_is_1(folder, capsys):
    frozen = "def frozen():\n    return nn.Linear(4, 4).requires_grad_(False), torch.ones(2, 4)"
    (folder / "a_model.py").write_text(MODEL + frozen)
    assert main(["explain", "a_model:frozen", "--repro", "a.py"]) == 1
    told = capsys.readouterr()
    assert "0 chains" in told.out and "no joint graph" in told.err


def test_the_doctor_finds_this_machine_well():
    done = subprocess.run(
        [sys.executable, "-m", "hwbp_compiler", "doctor"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("torch 2.", "C++ compiler", "caches", "linear_scan", "All is well."):
        assert what in done.stdout


def test_the_doctor_tells_what_is_missing_and_does_not_break_on_it(monkeypatch, tmp_path, capsys):
    from torch._inductor.runtime import runtime_utils

    blocked = tmp_path / "a_file"
    blocked.write_text("")
    monkeypatch.setattr(runtime_utils, "cache_dir", lambda: str(blocked / "cache"))
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda **kwargs: 1 / 0)
    monkeypatch.setenv("PATH", "")
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "!! entry point" in printed and "ZeroDivisionError" in printed
    assert "!! caches" in printed and "set TORCHINDUCTOR_CACHE_DIR" in printed
    assert "!! C++ compiler" in printed
