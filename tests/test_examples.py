"""The examples run, all methods start alike, and an interrupted and resumed run ends like an uninterrupted one."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hwbp_compiler.testing

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
}  # fmt: skip
SLOW = {"resnet_cifar", "resnet_cifar_strided", "char_lm_gru", "finetune_bert"}


def script(case: str) -> str:
    scripts = ("resnet_cifar", "pixel_gru", "custom_cell", "char_lm", "finetune_bert")
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
    """A run whose chains were not rewritten is exact backprop, so it must not enter the table as Highway-BP."""
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
