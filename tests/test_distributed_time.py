"""Claims about a recurrence whose time is sharded over ranks, compared with an oracle in one process."""

from __future__ import annotations

import pytest
import stretches
import torch
import torch.distributed as dist
from stretches import Case, oracle

from hwbp_compiler.errors import OptionError

CASES: dict[int, dict[str, Case]] = {
    2: {
        "gru": Case("GRU", (3, 2), 0, 0.2),
        "dtensor": Case("LSTM", (2, 2), 0, batch_first=True, dtensor=True),
        "other_options_later": Case("GRU", (2, 2), 0, later=1),
    },
    4: {
        **{
            f"{kind.lower()}_k{k}_g{g}": Case(kind, (3, 2, 4, 2), k, g)
            for kind in ("GRU", "LSTM")
            for k, g in [(0, 0.0), (0, 0.2), (1, 0.0), (1, 0.2), (2, 0.2), (3, 0.2)]
        },
        **{f"cell_k{k}_g{g}": Case("Cell", (2, 3, 1, 2), k, g) for k, g in [(0, 0.0), (1, 0.2), (3, 0.2)]},
        "gru_cell": Case("GRUCell", (2, 1, 2, 2), 1, 0.2),
        "scalar": Case("Scalar", (2, 1, 2, 2), 1, 0.2),
        "exact": Case("LSTM", (3, 2, 4, 2), "exact"),
        "rnn": Case("RNN", (3, 2, 4, 2), 0),
        "stacked_gru": Case("GRU", (2, 3, 1, 2), 1, 0.2, layers=3),
        "stacked_lstm": Case("LSTM", (2, 3, 1, 2), 1, 0.2, layers=2),
        "last_alone": Case("GRU", (2, 2, 2, 2), 1, losses="last"),
        "batch_first": Case("GRU", (2, 2, 2, 2), 1, batch_first=True, state=False),
        "one_batch": Case("LSTM", (2, 2, 2, 2), 1, batches=1),
        "two_batches": Case("GRU", (2, 2, 2, 2), 1, batches=2),
        "frozen": Case("GRU", (2, 2, 2, 2), 1, frozen=True),
    },
}
ALL = [(size, name) for size, cases in CASES.items() for name, case in cases.items() if case.later is None]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = {}

    def of(size):
        if size not in results:
            try:
                results[size] = stretches.run(size, CASES[size], tmp_path_factory.mktemp(f"time{size}"))
            except Exception as error:
                results[size] = error
        if isinstance(results[size], Exception):
            raise results[size]
        return results[size]

    return of


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def total(ranks, case):
    """The result of all ranks: parameters' gradients are summed, those of the shards joined, those of the first state
    are rank 0's.
    """
    names = ranks[0].keys() - {"x", "y", "last"}
    summed = {n: sum(r[n] for r in ranks) for n in names if not n.startswith("state")}
    of_state = {n: ranks[0][n] for n in names if n.startswith("state")}
    return summed | of_state | {"x": torch.cat([r["x"] for r in ranks])}


@pytest.mark.parametrize(("size", "name"), ALL)
def test_gradients_are_those_of_segments_on_ranks(found, size, name):
    case = CASES[size][name]
    got, want = total(found(size)[name], case), oracle(case)
    assert got.keys() >= {
        n for n in want if not (case.frozen and n == "weight_ih_l0") and (case.state or "state" not in n)
    }
    for name_, gradient in got.items():
        torch.testing.assert_close(gradient, want[name_], rtol=1e-10, atol=1e-12, msg=lambda m, n=name_: f"{n}: {m}")


@pytest.mark.parametrize(("size", "name"), [(4, "stacked_lstm"), (4, "batch_first"), (2, "dtensor")])
def test_outputs_and_last_state_are_those_of_the_module(found, size, name):
    case = CASES[size][name]
    module, (x, first, _, _) = case.build(), case.data()
    module.batch_first = False
    y, last = module(x, tuple(first) if case.kind == "LSTM" else first[0])
    ranks = found(size)[name]
    torch.testing.assert_close(torch.cat([r["y"] for r in ranks]), y)
    for r in ranks:
        torch.testing.assert_close(r["last"], torch.stack(last) if case.kind == "LSTM" else last.unsqueeze(0))


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_the_oracle_is_backprop_from_the_last_rank_but_one(kind, k):
    case = Case(kind, (2, 2, 2, 2), k)
    module, (x, first, of_y, of_last) = case.build(), case.data()
    x.requires_grad_()
    y, last = module(x, tuple(first) if kind == "LSTM" else first[0])
    last = torch.stack(last) if kind == "LSTM" else last.unsqueeze(0)
    ((y * of_y).sum() + 4 * (last * of_last).sum()).backward()
    got = oracle(case)["x"]
    same = [bool((a - b).norm() < 1e-12) for a, b in zip(got.split(2), x.grad.split(2), strict=True)]
    assert same == [k >= 3, k >= 2, k >= 1, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"iterations": -1}, "distributed.recurrent: option 'iterations' = -1 (int) is not allowed"),
        ({"segment": 4}, "option 'segment' = 4 (int) is not allowed; it takes None"),
        ({"batches": 0}, "option 'batches' = 0 (int) is not allowed; it takes an integer >= 1"),
    ],
)
def test_a_bad_option_is_told_of_at_once(options, words):
    from hwbp_compiler.distributed import recurrent

    with pytest.raises(OptionError) as raised:
        recurrent(torch.nn.GRU(2, 2), torch.zeros(1, 1, 2), mesh=None, **options)
    assert words in str(raised.value)


def test_other_options_in_a_later_call_are_refused_on_every_rank(found):
    for got in found(2)["other_options_later"]:
        assert "RankError: distributed.recurrent: rank 1 has iterations = 1, rank 0 has 0" in got["error"]


@pytest.fixture
def alone(tmp_path):
    """A mesh that contains only this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(3, 2), r"a tensor \[3, 2\]"),
        (torch.nn.utils.rnn.pack_sequence([torch.zeros(3, 2)]), "a PackedSequence"),
    ],
    ids=["unbatched", "packed"],
)
def test_what_is_no_batch_of_sequences_is_refused(alone, x, words):
    from hwbp_compiler.distributed import StageError, recurrent

    with pytest.raises(StageError, match=f"x_shard is {words}; it takes"):
        recurrent(torch.nn.GRU(2, 3), x, mesh=alone)


class Mixing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 3)

    def forward(self, x, state):
        following = torch.tanh(self.linear(torch.cat([x, state], -1)))
        return following, following


def test_a_state_that_autocast_makes_another_is_refused(alone):
    from hwbp_compiler.distributed import StageError, recurrent

    x, state = torch.randn(2, 4, 2, dtype=torch.float32), torch.randn(4, 3, dtype=torch.float32)
    words = r"float32.* before this rank's steps and .*bfloat16.* after them"
    with pytest.raises(StageError, match=words), torch.autocast("cpu", torch.bfloat16):
        recurrent(Mixing().float(), x, state, mesh=alone)


@pytest.mark.parametrize(
    ("kind", "traces"), [("Cell", [1, 1, 2, 3]), ("Scalar", [1, 2, 3, 4])], ids=["tensor", "number"]
)
def test_a_cell_is_traced_again_where_it_may_be_another(kind, traces, monkeypatch):
    """If K is a Python number, it could change unnoticed; a tensor is checked in every step."""
    from hwbp_compiler.distributed import layers

    found, look = [], layers.highway_of_cell
    monkeypatch.setattr(layers, "highway_of_cell", lambda *a: found.append(look(*a)) or found[-1])
    cell, x, part = stretches.CELLS[kind](), torch.randn(2, 3, stretches.INPUT), torch.randn(3, stretches.HIDDEN)
    counted = []
    for change in (lambda: None, lambda: None, cell.eval, lambda: setattr(cell, "depth", 2)):
        change()
        assert layers.CellLayer(cell, x, {"a": part, "b": part} if kind == "Cell" else part, exact=False).support
        counted.append(len(found))
    assert counted == traces
    assert not layers.CellLayer(cell, x, part, exact=True).support and len(found) == traces[-1]
