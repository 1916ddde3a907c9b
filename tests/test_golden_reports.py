"""The report on one model of every family, in fields that change only when the findings change.

``UPDATE_GOLDEN=1 pytest tests/test_golden_reports.py`` writes the file again: read the difference before committing it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import CASES
from zoo.case import Case, setup

from hwbp_compiler import explain, recurrent
from hwbp_compiler.report.alike import entries_of

GOLDEN = Path(__file__).parent / "golden" / "reports.txt"
OPTIONS = {"iterations": 1, "rewrite": "always", "min_length": 2}
FAMILIES = (
    "mlp_module_list", "resnet_preact_train", "resnet_postact_eval", "decoder_causal", "encoder_post_norm",
    "encoder_parallel", "encoder_tied_layers", "torch_encoder_pre_norm_dropout", "gru_cell_every_step",
    "lstm_cell_start_given", "chunk_gru_last_step", "cat_lstm_last_step", "min_gru_every_step", "diagonal_last_step",
    "gru_2_layers_interleaved_every_step", "gru_3_layers_layer_by_layer_last_step", "encoder_decoder",
    "activity_penalties", "hf_gpt2_sdpa", "hf_llama_sdpa", "hf_bert_eager", "hf_roberta_sdpa", "hf_vit_sdpa",
    "nothing_densenet", "nn_gru", "nn_gru_2_layers_both_directions", "nn_lstm", "nn_rnn", "recurrent_gru",
)  # fmt: skip


class Reader(nn.Module):
    """A recurrent module from PyTorch."""

    def __init__(self, kind: type[nn.Module], **arguments: Any) -> None:
        super().__init__()
        self.reader = kind(3, 4, **arguments)

    def forward(self, x):
        return self.reader(x)[0]


class GRUOfOnesOwn(nn.Module):
    """A user-defined cell over time, by ``hwbp_compiler.recurrent``."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def step(self, x, h):
        h = self.cell(x, h)
        return h, h

    def forward(self, x):
        return recurrent(self.step, x, x.new_zeros(x.shape[1], 4))[0]


MODULES = (
    Case("nn_gru", setup(lambda: Reader(nn.GRU), (7, 2, 3)), None),
    Case("nn_gru_2_layers_both_directions", setup(lambda: Reader(nn.GRU, num_layers=2, bidirectional=True), (7, 2, 3)),
         None),
    Case("nn_lstm", setup(lambda: Reader(nn.LSTM), (7, 2, 3)), None),
    Case("nn_rnn", setup(lambda: Reader(nn.RNN), (7, 2, 3)), None),
    Case("recurrent_gru", setup(GRUOfOnesOwn, (7, 2, 3)), None),
)  # fmt: skip
BY_NAME = {case.name: case for case in (*CASES, *MODULES)}


def fields(name: str) -> str:
    """No line numbers and no figures: names, the code of lines, counts of links."""
    model, args, loss = BY_NAME[name].build()
    torch.manual_seed(0)
    lines = [f"{name}"]
    report = explain(model, *args, options=OPTIONS, loss=loss)
    for graph in report.graphs:
        alike = [entry for entry in entries_of(graph.chains, 0) if len(entry.positions) > 1]
        lines += [f"  {entry.title}: {entry.record.module}" for entry in alike]
    for chain in report.chains:
        lines.append(f"  {chain.length} links, {chain.decision}, times {chain.times}, K = {chain.multiplier or '-'}")
        lines.append(f"    module   {chain.module or '-'}")
        for source in chain.sources:
            path, _, code = re.fullmatch(r"(.*?):(\d+): (.*)", source).groups()
            lines.append(f"    source   {Path(path).name}: {code}")
        for group in chain.groups:
            heavy = ", ".join(f"{times} {operator}" for operator, times in sorted(group.operators.items()))
            lines.append(f"    group    {group.links} links, K = {group.multiplier}: {heavy or 'elementwise only'}")
        lines.append(f"    losses   after {chain.side_losses or 'none'}")
        lines.append(f"    why      {chain.reason.partition(';')[0].partition(': ')[0]}")
    return "\n".join(lines) + "\n"


def golden() -> dict[str, str]:
    text = GOLDEN.read_text() if GOLDEN.exists() else ""
    return {block.partition("\n")[0]: block for block in re.split(r"\n(?=\S)", text) if block}


@pytest.fixture(scope="module")
def written():
    found: dict[str, str] = {}
    yield found
    if os.environ.get("UPDATE_GOLDEN") and found:
        merged = {**golden(), **found}
        GOLDEN.write_text("\n".join(merged[name].rstrip("\n") + "\n" for name in FAMILIES if name in merged))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_report_of_a_family_is_the_one_committed(name, written):
    written[name] = fields(name)
    if not os.environ.get("UPDATE_GOLDEN"):
        assert written[name].strip() == golden()[name].strip()
