"""The examples run, all methods start with the same weights, and a resumed run ends like an uninterrupted one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx

import hwbp_compiler.testing
from hwbp_compiler import backend

EXAMPLES = Path(__file__).parents[1] / "examples"

# Script and arguments of a small run; "slow" if compiling takes long.
SMALL = {
    "resnet_cifar": ["--depth", "32", "--width", "4", "--batch", "8"],
    "resnet_cifar_strided": ["--depth", "32", "--width", "4", "--batch", "8", "--shortcut", "strided"],
    "pixel_gru": ["--hidden", "8", "--batch", "8"],
    "custom_cell": ["--hidden", "8", "--batch", "8"],
    "char_lm_gru": ["--cell", "gru", "--layers", "2", "--width", "16", "--length", "12", "--batch", "4"],
    "char_lm_lstm": ["--cell", "lstm", "--width", "16", "--length", "12", "--batch", "4"],
    "char_lm_transformer": [
        "--cell", "transformer", "--layers", "2", "--width", "32", "--length", "12", "--batch", "4",
    ],
    "finetune_bert": ["--layers", "2", "--width", "32", "--batch", "8"],
    "recurrent_ppo": ["--longest", "8", "--hidden", "8", "--batch", "8", "--passes", "3"],
    "forecast": ["--hidden", "8", "--length", "60", "--batch", "8"],
}  # fmt: skip
SLOW = {"resnet_cifar", "resnet_cifar_strided", "char_lm_gru", "finetune_bert"}


def script(case: str) -> str:
    scripts = ("resnet_cifar", "pixel_gru", "custom_cell", "char_lm", "finetune_bert", "recurrent_ppo", "forecast")
    return next(name for name in scripts if case.startswith(name))


@pytest.fixture
def load(monkeypatch):
    """Import a module of examples/ as the scripts do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def run(case: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / f"{script(case)}.py"), *SMALL[case], *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in SMALL])
def test_the_script_trains_and_leaves_log_plot_and_checkpoint(case, tmp_path):
    run(case, "--iterations", "1", "--steps", "2", "--every", "1", "--out", str(tmp_path))
    log = (tmp_path / "log.csv").read_text().splitlines()
    assert log[0].startswith("step,loss,cosine,") and len(log) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"log.csv", "log.png", "checkpoint.pt"}


@pytest.fixture
def no_code(monkeypatch):
    """Run Inductor's graphs directly, which saves generating code for them."""

    def compile_(gm, inputs, patches):
        inner = lambda module, example_inputs, **kwargs: make_boxed_func(module.forward)  # noqa: E731
        return compile_fx(gm, inputs, inner_compile=inner, config_patches=dict(patches))

    monkeypatch.setattr(backend, "compile_fx", compile_)


@pytest.mark.parametrize("case", sorted(SLOW))
def test_a_script_that_compiles_slowly_trains_without_code(case, load, no_code, tmp_path):
    training, example = load("training"), load(script(case))
    words = ["--iterations", "1", "--steps", "2", "--every", "1", "--device", "cpu", "--out", str(tmp_path)]
    args = example.arguments([*SMALL[case], *words])
    hwbp_compiler.reset_counters()
    training.main(example.task(args), args)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3
    assert hwbp_compiler.counters()["chains_rewritten"] > 0


def test_the_quickstart_runs(load, no_code, monkeypatch, capsys):
    small = "--blocks 5 --width 8 --batch 256 --epochs 1 --side 8 --pixel-batch 256 --pixel-epochs 1 --every 2"
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *small.split()])
    load("quickstart").main()
    printed = capsys.readouterr().out
    runs = re.findall(r"(?m)^ *(\S.*?) +[\d.]+% ", printed)
    assert runs == ["exact", "defaults", "exact, eager", "exact", "defaults"]


def test_the_outputs_of_the_inspecting_page_are_written_anew(load, monkeypatch, tmp_path):
    inspect_models = load("inspect_models")
    committed = (inspect_models.DOCS / "inspecting.md").read_text()
    (tmp_path / "inspecting.md").write_text(committed)
    monkeypatch.setattr(inspect_models, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["inspect_models.py", "gru", "--no-pictures"])
    small = inspect_models.NextValue(8), torch.randn(6, 2, 1), lambda output: output.square().mean()
    monkeypatch.setitem(inspect_models.MODELS, "gru", lambda: small)
    inspect_models.main()

    def output(page: str) -> re.Match[str]:
        return re.search(r"<!-- output: gru -->.*?```\n\n", page, re.DOTALL)

    written = (tmp_path / "inspecting.md").read_text()
    assert "chain 1: 6 links, rewritten" in output(written)[0]
    assert written.replace(output(written)[0], "") == committed.replace(output(committed)[0], "")


@pytest.mark.parametrize("name", ["gpt2", "resnet", "gru"])
def test_the_models_of_the_inspecting_page_have_a_loss(name, load):
    model, inputs, loss = load("inspect_models").MODELS[name]()
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    assert loss(output).isfinite()


# -- the notebook -----------------------------------------------------------------------------------------------------


def cells() -> list[str]:
    found = json.loads((EXAMPLES / "layerwise_gradients.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def test_the_notebook_runs_from_top_to_bottom(no_code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("out", "__pycache__"))
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    smaller = {
        "LAYERS, STEPS = 4, 300": "LAYERS, STEPS = 2, 5",
        "[0, 1, 2, 4], [0.0, 0.2, 0.5, 1.0]": "[0, 2], [0.2, 1.0]",
    }
    text = "\n".join(cells())
    for full, small in smaller.items():
        assert text.count(full) == 1
        text = text.replace(full, small)
    exec(compile(text, "notebook", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "chain 1: 4 links, rewritten" in printed and printed.rstrip().splitlines()[-1].lstrip().startswith("fpi")


@pytest.fixture
def first_cell(monkeypatch, tmp_path):
    """Runs the notebook's first cell outside a checkout. Its shell commands are recorded, not executed."""
    commands: list[list[str]] = []
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))

    def run(repository: str) -> list[list[str]]:
        exec(cells()[0].replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}"), {})
        return commands

    return run


def test_outside_of_a_checkout_the_notebook_asks_where_to_clone_from(first_cell):
    with pytest.raises(AssertionError, match="set REPOSITORY"):
        first_cell("")


def test_the_notebook_clones_and_installs_what_is_missing(first_cell, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    clone, install = first_cell("somewhere")
    checkout = str(tmp_path / "checkout")
    assert clone == ["git", "clone", "--depth", "1", "somewhere", checkout]
    assert install == [sys.executable, "-m", "pip", "install", "-q", f"{checkout}[examples]"]
    assert sys.path[0] == f"{checkout}/examples"


# -- resuming and methods ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_run_that_was_interrupted_logs_what_one_that_was_not_logs(tmp_path):
    words = ["--iterations", "1", "--steps", "6", "--every", "2", "--watch", "3"]
    run("char_lm_transformer", *words, "--out", str(tmp_path / "whole"))
    run("char_lm_transformer", *words, "--out", str(tmp_path / "parts"), "--stop", "3")
    run("char_lm_transformer", *words, "--out", str(tmp_path / "parts"), "--resume")
    assert (tmp_path / "parts" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()


@pytest.mark.parametrize("case", SMALL)
def test_resuming_is_exact_to_the_last_bit(case, load, tmp_path):
    """Dropout, BatchNorm's statistics, Adam's moments and the mean of losses not yet logged are restored."""
    training, example = load("training"), load(script(case))

    def train(out: str, *words: str) -> list[dict]:
        words = (*SMALL[case], "--steps", "7", "--every", "3", "--out", str(tmp_path / out), *words)
        args = example.arguments([*words, "--device", "cpu"])
        task = example.task(args)
        # In eager mode and with exact gradients, because a resumed loop compares gradients at its first step.
        with hwbp_compiler.testing.exactly():
            return training.train(task, args, task.model)

    whole = train("whole")
    assert [row["step"] for row in whole] == [3, 6, 7]
    train("parts", "--stop", "4")
    assert train("parts", "--resume") == whole


@pytest.mark.parametrize("case", SMALL)
def test_methods_start_from_the_same_weights_and_see_the_same_batches(case, load):
    example = load(script(case))
    tasks = [
        example.task(example.arguments([*SMALL[case], "--method", method, "--seed", "3", "--device", "cpu"]))
        for method in ("exact", "highway", "fpi")
    ]
    for other in tasks[1:]:
        for ours, theirs in zip(tasks[0].model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        for step in (1, 2, 500):
            assert all(map(torch.equal, tasks[0].batch(step), other.batch(step)))


def test_methods_are_one_option_apart(load):
    training = load("training")
    parse = training.parser("", damping=0.2).parse_args
    assert training.compile_options(parse(["--method", "exact"])) == {"iterations": "exact"}
    assert training.compile_options(parse(["--iterations", "5"])) == {
        "iterations": 5, "damping": 0.2, "rewrite": "always",
    }  # fmt: skip
    assert training.compile_options(parse(["--method", "auto", "--check-every", "7"])) == {"check_every": 7}
    assert training.compile_options(parse(["--method", "fpi", "--iterations", "5"]))["damping"] == 1.0


def test_watching_leaves_statistics_and_random_numbers_as_they_were(load):
    training, example = load("training"), load("resnet_cifar")
    task = example.task(example.arguments(SMALL["resnet_cifar"]))
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    random = torch.get_rng_state()
    found = training.gradient(task, torch.nn.Sequential(task.model, torch.nn.Dropout(0.1)), *task.batch(1))
    assert len(found) == sum(p.numel() for p in task.model.parameters()) and found.norm() > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())


def test_a_run_is_not_resumed_with_other_options(load, tmp_path):
    training, example = load("training"), load("pixel_gru")

    def train(*words: str) -> None:
        args = example.arguments([*SMALL["pixel_gru"], "--steps", "1", "--out", str(tmp_path), *words])
        task = example.task(args)
        training.train(task, args, task.model)

    train()
    with pytest.raises(SystemExit, match=r"--iterations 10 \(now 3\)"):
        train("--resume", "--iterations", "3")


def test_the_schedule_warms_up_for_a_tenth_and_falls_to_a_tenth(load):
    rates = [load("training").learning_rate(step, 100, 1.0) for step in range(1, 101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_augmentation_moves_and_mirrors_whole_images(load):
    data = load("data")
    x = torch.rand(16, 3, 8, 8) + 1  # no zeros except the padding
    moved = data.flipped_and_shifted(x, data.generator(0, 1))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    for image, result in zip(padded, moved, strict=True):
        places = [side[:, i : i + 8, j : j + 8] for side in (image, image.flip(2)) for i in range(9) for j in range(9)]
        assert any(torch.equal(place, result) for place in places)


def test_cifar_is_read_from_a_folder(load, tmp_path):
    import pickle

    data = load("data")
    with pytest.raises(SystemExit, match="data_batch_1"):
        data.cifar("cifar10", str(tmp_path))
    for i, part in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = torch.full((2, 3072), i, dtype=torch.uint8).numpy()
        (tmp_path / part).write_bytes(pickle.dumps({b"data": pixels, b"labels": [i, i]}))
    x, test_x, labels, test_labels = data.cifar("cifar10", str(tmp_path))
    assert x.shape == (10, 3, 32, 32) and test_x.shape == (2, 3, 32, 32)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and test_labels.tolist() == [5, 5]
    assert x[9].unique().item() == pytest.approx(4 / 255)


def test_the_results_claim_nothing_that_the_gradients_did_not_earn(monkeypatch):
    """A run without rewritten chains is exact backprop, so the table must not list it as Highway-BP."""
    from benchmarks import accuracy

    monkeypatch.setattr(torch, "compile", lambda model, **how: model)
    case = next(case for case in accuracy.CASES if case.example == "pixel_gru")
    with pytest.raises(LookupError, match="no chain was rewritten"):
        accuracy.Trained(case, accuracy.HIGHWAY[1], "cpu", quick=True)


@pytest.mark.parametrize(
    "case, words, said",
    [
        ("pixel_gru", ["--steps", "0"], "argument --steps: 0, but at least 1 is needed"),
        ("pixel_gru", ["--batch", "0"], "argument --batch: 0, but at least 1 is needed"),
        ("pixel_gru", ["--every", "-1"], "argument --every: -1, but at least 1 is needed"),
        ("char_lm_gru", ["--text", "nowhere.txt"], "--text nowhere.txt: .*it takes a text file in UTF-8"),
        ("char_lm_gru", ["--text", "short.txt"], "--text has 12 characters; --length 12 needs 130 or more"),
        ("char_lm_gru", ["--text", "latin.txt"], "--text latin.txt: .*it takes a text file in UTF-8"),
        ("finetune_bert", ["--pairs", "nowhere.tsv"], "--pairs nowhere.tsv: .*it takes a text file in UTF-8"),
        ("finetune_bert", ["--pairs", "one.tsv"], "1 pairs of sentences; two are needed"),
        ("finetune_bert", ["--weights", "nowhere"], "--weights nowhere: no such folder; nothing is downloaded"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_words(case, words, said, load, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("abcdefghijkl")
    Path("latin.txt").write_bytes("ü".encode("latin-1") * 500)
    Path("one.tsv").write_text("1\ta\tb\n")
    example = load(script(case))
    with pytest.raises(SystemExit) as refused:
        example.task(example.arguments([*SMALL[case], *words, "--device", "cpu"]))
    assert re.search(said, f"{refused.value.code} {capsys.readouterr().err}")


def test_only_runs_with_a_log_are_plotted(load, tmp_path):
    with pytest.raises(SystemExit, match="no log.csv there"):
        load("training").plot([tmp_path / "nowhere"], tmp_path / "runs.png")


def test_weights_with_a_classifier_of_other_classes_are_taken(load, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    shape = {"vocab_size": 7, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4}
    config = transformers.BertConfig(**shape, num_attention_heads=2, max_position_embeddings=64, num_labels=2)
    saved = transformers.BertForSequenceClassification(config)
    saved.save_pretrained(tmp_path)
    (tmp_path / "pairs.tsv").write_text("\n".join(f"{i % 3}\ta b\tb a" for i in range(12)))
    example = load("finetune_bert")
    words = ["--weights", str(tmp_path), "--pairs", str(tmp_path / "pairs.tsv"), "--batch", "2", "--device", "cpu"]
    task = example.task(example.arguments(words))
    assert task.model.encoder.classifier.out_features == 3
    assert torch.equal(task.model.encoder.bert.pooler.dense.weight, saved.bert.pooler.dense.weight)
    assert task.model(task.batch(1)[0]).shape == (2, 3)
