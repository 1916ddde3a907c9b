"""The backend around the passes: it is found by name, works with Inductor, and is harmless when something fails."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters as torch_counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

import hwbp_compiler
from hwbp_compiler import HighwayError, Options, digest, joint_pass, pass_sequence, passes
from hwbp_compiler.reasons import Reason
from hwbp_compiler.torch_private import CustomGraphPass, _warn_if_newer

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Model(nn.Module):
    """Only elementwise operators: it compiles fast, and there is nothing to autotune."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).sin()


@dataclass
class Record:
    decision: str
    reason: str = "because"
    reason_code: Reason | None = None
    length: int = 4
    failed: bool = False
    module: str = ""
    source: str = ""
    candidates: tuple = ()


class NamedPass(CustomGraphPass):
    def __init__(self, called: list[str], name: str = "user") -> None:
        self.called, self.name = called, name

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.called.append(self.name)

    def uuid(self) -> str:
        return self.name


def step(compiled: nn.Module) -> torch.Tensor:
    """The gradient of one training step."""
    compiled(X).sum().backward()
    return next(compiled.parameters()).grad


def assert_right_gradient(model: Model) -> None:
    torch.testing.assert_close(model.weight.grad, (X * (X * model.weight).cos()).sum(0).detach())


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """Replaces the passes by one that only records that it was called."""
    called: list[str] = []

    def run(graph, options):
        called.append("highway")
        return []

    monkeypatch.setattr(passes, "run", run)
    return called


@pytest.fixture
def broken(monkeypatch) -> None:
    """Replaces the passes by one that always fails."""

    def run(graph, options):
        raise KeyError("a broken step")

    monkeypatch.setattr(passes, "run", run)
    joint_pass.warn_once.cache_clear()


def run_python(code: str, cwd: Path, **env: str) -> str:
    """The output of a fresh process, started outside the repository so that only what is installed counts."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "TORCHINDUCTOR_AUTOGRAD_CACHE": "0", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


TRAIN = """
import sys, torch
weight = torch.ones(3, requires_grad=True)
torch.compile(lambda x: (x * weight).sin(), backend="highway")(torch.zeros(2, 3)).sum().backward()
assert weight.grad.tolist() == [0, 0, 0]
"""


def test_the_entry_point_alone_suffices(tmp_path):
    run_python(f"import torch, sys; assert 'hwbp_compiler' not in sys.modules\n{TRAIN}", tmp_path)


def test_torch_logs_knows_the_package_in_a_process_that_never_imports_it(tmp_path):
    assert "joint graph of" in run_python(TRAIN, tmp_path, TORCH_LOGS="+hwbp_compiler")


def test_importing_the_package_does_not_import_torch(tmp_path):
    run_python("import sys, hwbp_compiler; dir(hwbp_compiler); assert 'torch' not in sys.modules", tmp_path)


def test_every_public_name_can_be_imported():
    for name in hwbp_compiler.__all__:
        assert getattr(hwbp_compiler, name) is not None
    assert callable(hwbp_compiler.counters)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hwbp_compiler.no_such_name


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1"])
def test_known_versions_of_torch_give_no_warning(version, recwarn):
    _warn_if_newer(version)
    assert not recwarn.list


@pytest.mark.parametrize("version", ["2.15.0a0+git123", "3.0.0"])
def test_a_newer_torch_than_any_known_gives_a_warning(version):
    with pytest.warns(UserWarning, match=f"up to torch 2.14; this is torch {version[:3]}"):
        _warn_if_newer(version)


def test_every_package_in_the_repository_is_installed():
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    package = root / "hwbp_compiler"  # with the files of passes/: the link in the package is not followed
    inits = [*package.rglob("__init__.py"), *(package / "passes").rglob("__init__.py")]
    assert set(listed) == {".".join(init.parent.relative_to(root).parts) for init in inits}


def test_training_is_counted_and_right(called):
    model = Model()
    step(torch.compile(model, backend="highway"))
    assert_right_gradient(model)
    assert called == ["highway"]
    assert hwbp_compiler.counters() == {
        "graphs_seen": 1,
        "inference_graphs": 0,
        "chains_found": 0,
        "chains_rewritten": 0,
        "chains_declined": 0,
        "failures": 0,
    }


def test_inference_graphs_are_left_alone(called):
    with torch.no_grad():
        torch.compile(Model(), backend="highway")(X)
    assert called == []
    assert hwbp_compiler.counters()["graphs_seen"] == hwbp_compiler.counters()["inference_graphs"] == 1


def test_the_passes_get_the_users_options(monkeypatch):
    seen = []
    monkeypatch.setattr(passes, "run", lambda graph, options: seen.append(options) or [])
    step(torch.compile(Model(), backend="highway", options={"iterations": 2, "damping": 0.5}))
    assert seen == [Options(iterations=2, damping=0.5)]


def test_what_became_of_each_chain_is_counted_and_logged(monkeypatch, caplog):
    short = Reason.TOO_SHORT
    records = [Record("rewritten"), Record("declined", "too short", short), Record("declined", "too short", short)]
    monkeypatch.setattr(passes, "run", lambda graph, options: records)
    with caplog.at_level(logging.INFO, "hwbp_compiler"):
        # Declining is not failing: strict does not raise.
        step(torch.compile(Model(), backend="highway", options={"strict": True}))
    counted = hwbp_compiler.counters()
    assert counted["chains_found"] == 3
    assert counted["chains_rewritten"] == 1
    assert counted["chains_declined"] == counted["declined: too_short"] == 2
    assert "chain of 4 links declined: too short" in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [
        {"options": {"max-autotune": True, "coordinate_descent_tuning": True}},
        {"mode": "max-autotune-no-cudagraphs"},
    ],
    ids=["options", "mode"],
)
def test_options_and_mode_reach_inductor(monkeypatch, arguments):
    seen = []

    def run(graph, options):
        seen.append((inductor_config.max_autotune, inductor_config.coordinate_descent_tuning))
        return []

    monkeypatch.setattr(passes, "run", run)
    step(torch.compile(Model(), backend="highway", **arguments))
    assert seen == [(True, True)]
    assert not inductor_config.max_autotune


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_the_users_own_passes_in_options_run_before_ours(called, several):
    mine = NamedPass(called, "1"), lambda graph: called.append("2")
    options = {"joint_custom_pre_pass": list(mine) if several else mine[0]}
    step(torch.compile(Model(), backend="highway", options=options))
    assert called == (["1", "2", "highway"] if several else ["1", "highway"])


def test_the_users_own_pass_in_inductors_config_runs_before_ours(called):
    with inductor_config.patch(joint_custom_pre_pass=NamedPass(called)):
        step(torch.compile(Model(), backend="highway"))
    assert called == ["user", "highway"]


def test_a_users_pass_without_uuid_is_not_cached_and_still_compiles(called):
    with inductor_config.patch(fx_graph_cache=True), functorch_config.patch(enable_autograd_cache=True):
        torch_counters["aot_autograd"].clear()
        options = {"joint_custom_pre_pass": lambda graph: called.append("user")}
        step(torch.compile(Model(), backend="highway", options=options))
    assert called == ["user", "highway"]
    assert torch_counters["aot_autograd"]["autograd_cache_bypass"] == 1
    assert torch_counters["aot_autograd"]["autograd_cache_saved"] == 0


def test_rewrite_never_is_inductor_without_any_pass_of_ours(called):
    options = {"rewrite": "never", "joint_custom_pre_pass": NamedPass(called)}
    model = Model()
    step(torch.compile(model, backend="highway", options=options))
    assert_right_gradient(model)
    assert called == ["user"]
    assert hwbp_compiler.counters()["graphs_seen"] == 0


def test_a_failing_step_leaves_the_model_right_and_is_counted_each_time_and_logged_once(broken, caplog):
    for _ in range(2):
        model = Model()
        step(torch.compile(model, backend="highway"))
        assert_right_gradient(model)
        torch._dynamo.reset()
    assert hwbp_compiler.counters()["failures"] == 2
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and "KeyError: 'a broken step'" in warned[0]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_strict_raises_what_failed_as_a_highway_error(broken, fullgraph):
    compiled = torch.compile(Model(), backend="highway", options={"strict": True}, fullgraph=fullgraph)
    with pytest.raises(HighwayError, match="KeyError: 'a broken step'") as raised:
        compiled(X)
    assert type(raised.value) is HighwayError
    assert isinstance(raised.value.inner_exception, KeyError)
    # The traceback leads from the user's call to the step that failed, without Dynamo's own frames.
    assert raised.traceback[-1].name == "run"
    assert not any("symbolic_convert" in str(entry.path) for entry in raised.traceback)


def test_the_pass_can_be_pickled():
    ours = joint_pass.HighwayPass(Options(iterations="exact"))
    assert pickle.loads(pickle.dumps(ours)) == ours


@pytest.mark.parametrize(
    "change",
    [{"iterations": 5}, {"damping": 0.1}, {"rewrite": "always"}, {"min_length": 5}, {"strict": True}],
    ids=str,
)
def test_every_option_is_in_the_uuid(change):
    options = Options()
    uuid = joint_pass.HighwayPass(options).uuid()
    assert joint_pass.HighwayPass(replace(options, **change)).uuid() != uuid
    assert joint_pass.HighwayPass(replace(options)).uuid() == uuid


def test_the_uuid_of_a_sequence_is_none_when_one_pass_has_none():
    named, ours = NamedPass([]), joint_pass.HighwayPass(Options())
    assert pass_sequence.PassSequence((named, ours)).uuid() == ("user", ours.uuid())
    assert pass_sequence.PassSequence((print, ours)).uuid() is None


@pytest.fixture
def copied_sources(tmp_path, monkeypatch) -> Path:
    """All sources copied into the layout of a wheel, and the digest of the copy."""
    copy = tmp_path / "hwbp_compiler"
    for package, target in ((hwbp_compiler, copy), (passes, copy / "passes")):
        shutil.copytree(Path(package.__file__).parent, target, ignore=shutil.ignore_patterns("passes"))
        monkeypatch.setattr(package, "__path__", [str(target)])
    monkeypatch.setattr(digest, "__file__", str(copy / "digest.py"))
    return copy


def test_a_wheel_and_a_checkout_have_the_same_digest(request):
    checkout = digest.source_digest.__wrapped__()
    request.getfixturevalue("copied_sources")
    assert digest.source_digest.__wrapped__() == checkout


@pytest.mark.parametrize("place", ["backend.py", "graph/rules.py", "passes/__init__.py"])
def test_an_edit_anywhere_changes_the_digest(copied_sources, place):
    before = digest.source_digest.__wrapped__()
    source = copied_sources / place
    source.write_text(source.read_text()[:-1] + " ")  # of the same length
    assert digest.source_digest.__wrapped__() != before


def test_a_renamed_file_changes_the_digest(copied_sources):
    before = digest.source_digest.__wrapped__()
    (copied_sources / "backend.py").rename(copied_sources / "backend_.py")
    assert digest.source_digest.__wrapped__() != before


class Reader(nn.Module):
    """A loop that looks up a word in every step."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(words, 4), nn.GRUCell(4, 4)

    def forward(self, tokens):
        h = self.embedding.weight.new_zeros(tokens.shape[1], 4)
        for step in tokens.unbind(0):
            h = self.cell(self.embedding(step), h)
        return h


# nothing is left out, because the state starts from zero
ALL_LINKS = {"iterations": 6, "rewrite": "always", "strict": True}


class ColumnReader(Reader):
    """The same with a table's columns: the gradient is an ``index_put`` in the second dimension."""

    def __init__(self, words: int) -> None:
        super().__init__(words)
        self.embedding = nn.Linear(words, 4)

    def forward(self, tokens):
        h = self.embedding.weight.new_zeros(tokens.shape[1], 4)
        for step in tokens.unbind(0):
            h = self.cell(self.embedding.weight[:, step].t() + self.embedding.bias, h)
        return h


@pytest.mark.parametrize("reader, words", [(Reader, 1), (Reader, 11), (ColumnReader, 11)])
def test_an_embedding_read_at_every_step_gets_the_sum_of_its_gradients(reader, words):
    """Inductor lets writes into a copy of an expanded constant share one memory location. Without our rule, each row
    was added as often as there are links.
    """
    torch.manual_seed(0)
    model, tokens = reader(words).double(), torch.randint(words, (7, 3))
    compiled = torch.compile(model, backend="highway", options=ALL_LINKS)
    found, expected = (
        torch.autograd.grad(call(tokens).sin().sum(), list(model.parameters())) for call in (compiled, model)
    )
    assert hwbp_compiler.counters()["chains_rewritten"] == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_an_embedding_is_never_made_once_per_link():
    tokens = torch.randint(1000, (7, 3))
    after = hwbp_compiler.explain(Reader(1000), tokens, options=ALL_LINKS).graph_after
    shapes = {tuple(v.shape) for n in after.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)}
    assert (1000, 4) in shapes
    assert not {s for s in shapes if s[-2:] == (1000, 4) and len(s) > 2}
