"""Claims about a pipeline whose stages run their backward passes at once, compared with an oracle in one process."""

from __future__ import annotations

import doctest
import functools

import pipelines
import pytest
import torch
from pipelines import (
    Annealed,
    AnnealedElsewhere,
    Attention,
    BatchNormed,
    Case,
    Counting,
    Embedding,
    Gate,
    GivesComplex,
    HandsMaskOn,
    Head,
    Masked,
    Mixing,
    Overflowing,
    Pooling,
    PostLN,
    PreLN,
    ReLU,
    loss_fn,
    oracle,
)
from torch import nn

from hwbp_compiler.distributed import chains
from hwbp_compiler.errors import OptionError

KINDS = {"preln": PreLN, "postln": PostLN, "relu": ReLU}


def even(kind, stages, links=2):
    return ((kind,) * links,) * stages


def freeze_second(stage: nn.Module, index: int) -> None:
    if index == 1:
        stage.requires_grad_(False)
    else:
        stage[0].block.inner[0].bias.requires_grad_(False)


def freeze_first(stage: nn.Module, index: int) -> None:
    stage.requires_grad_(index > 0)


def tie(stage: nn.Module, index: int) -> None:
    stage[1].block = stage[0].block


def compiled(stage: nn.Module) -> nn.Module:
    return torch.compile(stage, backend="aot_eager")


def anneal(stage: nn.Module, step: int) -> None:
    for link in stage:
        link.alpha = 0.5 - 0.25 * step


def anneal_from_1(stage: nn.Module, step: int) -> None:
    for link in stage:
        link.alpha = 1.0 - 0.25 * step


def anneal_elsewhere(stage: nn.Module, step: int) -> None:
    pipelines.KEPT[0] = 0.5 - 0.25 * step


def other_iterations(rank: int) -> dict:
    return {"iterations": 2} if rank == 1 else {}


CASES: dict[int, dict[str, Case]] = {
    2: {f"batches_{m}": Case(even(PostLN, 2), k=0, batches=m) for m in (1, 2, 4)},
    3: {
        f"{name}_k{k}_g{g}": Case(even(kind, 3), k, g)
        for name, kind in KINDS.items()
        for k, g in [(0, 0.0), (0, 0.2), (1, 0.2), (2, 0.2)]
    }
    | {f"mask_k{k}": Case(even(Masked, 3), k, 0.2, wrap=HandsMaskOn) for k in (0, 1)}
    | {
        "annealed": Case(even(Annealed, 3), 0, 0.2, steps=2, scale=False, before=anneal),
        "annealed_from_1": Case(even(Annealed, 3), 0, steps=2, scale=False, before=anneal_from_1),
        "annealed_elsewhere": Case(even(AnnealedElsewhere, 3), 0, steps=2, before=anneal_elsewhere),
    }
    | {"overflows": Case(even(Overflowing, 3), 1)}
    | {"uneven_batches": Case(((Pooling, PreLN), (ReLU,), (ReLU,)), 0, 0.2, batches=3)}
    | {"complex": Case(even(PreLN, 3), 0, wrap=GivesComplex)},
    4: {
        **{
            f"{name}_k{k}_g{g}": Case(even(kind, 4), k, g)
            for name, kind in KINDS.items()
            for k, g in [(0, 0.0), (0, 0.2), (1, 0.0), (1, 0.2), (3, 0.2)]
        },
        "gate": Case(even(Gate, 4), 1, 0.2),
        "attention": Case(((Embedding, PreLN), (Attention, PreLN), (Attention, PreLN), (PreLN, Head)), 0, 0.2),
        "exact": Case(even(PostLN, 4), "exact"),
        "uneven": Case(((PostLN,), (PostLN,) * 3, (PostLN,) * 2, (PostLN,)), 1, 0.2),
        "batches_1": Case(even(ReLU, 4), 1, 0.2, batches=1),
        "batches_4": Case(even(PostLN, 4), 1, 0.2, batches=4),
        "sums": Case(even(PostLN, 4), 0, scale=False),
        "accumulated": Case(even(ReLU, 4), 0, steps=2, scale=False),
        "batchnorm": Case(even(BatchNormed, 4), 0, steps=2, scale=False, evaluate=True),
        "frozen": Case(even(PostLN, 4), 0, 0.2, prepare=freeze_second),
        "frozen_first": Case(even(PostLN, 4), 0, 0.2, prepare=freeze_first),
        "tied": Case(even(PostLN, 4), 0, 0.2, prepare=tie),
        "dropout_preln": Case(even(functools.partial(PreLN, 0.4), 4), 1, 0.2),
        "dropout_relu": Case(even(functools.partial(ReLU, 0.4), 4), 1, 0.2, steps=2, scale=False),
        "no_highway_in_the_middle": Case(((PostLN,), (PostLN,), (Mixing,), (PostLN,)), 0, 0.2),
        "no_highway_first": Case(((Embedding,), (ReLU,), (ReLU,), (ReLU, Head)), 0),
        "no_highway_next_to_the_loss": Case(((ReLU,), (ReLU,), (ReLU, Mixing), (Head,)), 0),
        "none_has_one": Case(even(Mixing, 4), 0),
        "compiled": Case(even(PostLN, 4), 1, 0.2, wrap=compiled),
        "changing": Case(even(PreLN, 4)[:2] + ((Counting,),) + ((PreLN,),), 0),
        "other_options": Case(even(PreLN, 4), 0, options_of=other_iterations),
    },
}
REFUSED = {"changing", "other_options", "complex", "annealed_elsewhere"}
RIGHT = [(size, name) for size, cases in CASES.items() for name in cases if name not in REFUSED | {"overflows"}]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of every rank, by case. There is one group of processes per size, started when first needed."""

    results = {}

    def of(size):
        if size not in results:
            try:
                results[size] = pipelines.run(size, CASES[size], tmp_path_factory.mktemp(f"ranks{size}"))
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


def assert_equal(ranks, expected, losses):
    for rank, (got, want) in enumerate(zip(ranks, expected, strict=True)):
        assert "error" not in got, got["traceback"]
        assert got["gradients"].keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(
                got["gradients"][name], gradient, rtol=1e-10, atol=1e-12, msg=lambda m, n=name, r=rank: f"{r} {n}: {m}"
            )
    torch.testing.assert_close(torch.stack(ranks[-1]["losses"]), torch.stack(losses))


@pytest.mark.parametrize(("size", "name"), RIGHT)
def test_gradients_are_those_of_segments_on_ranks(found, size, name):
    assert_equal(found(size)[name], *oracle(CASES[size][name]))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ("k", "same"), [(0, [False, False, True, True]), (1, [False, True, True, True]), (2, [True] * 4)]
)
def test_the_oracle_is_backprop_where_it_should_be(kind, k, same):
    """R = 4: at k = 0 the last two stages are exact; every iteration makes one more exact. k >= R - 2 is backprop."""
    case = Case(even(kind, 4), k, batches=1)
    stages = case.build()
    x, target = case.data()
    loss_fn(nn.Sequential(*stages)(x), target).backward()
    for stage, gradients, exact in zip(stages, oracle(case)[0], same, strict=True):
        error = sum(float((g - stage.get_parameter(n).grad).norm()) for n, g in gradients.items())
        assert error < 1e-12 if exact else error > 1e-4


def test_the_same_masks_in_every_round(found):
    """The losses use the masks that the seeds give, and with k = R the gradients are backprop's with these masks."""
    for name in ("dropout_preln", "dropout_relu"):
        losses = oracle(CASES[4][name])[1]
        torch.testing.assert_close(torch.stack(found(4)[name][-1]["losses"]), torch.stack(losses))


def test_a_highway_under_autocast_is_that_of_the_forward_pass():
    from hwbp_compiler.distributed.highway_of_stage import RandomState, find_highway

    stage = nn.Sequential(ReLU(), ReLU()).float()
    x = torch.randn(2, 3, pipelines.WIDTH, dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = stage(x)
        product = find_highway(stage, (x,), {}).product(stage, [x], y, RandomState.now(x.device))
        between = stage[0](x)
    assert torch.equal(product == 0, (y == 0) | (between == 0)) and ((product == 1) | (product == 0)).all()


def test_what_a_stage_is(found):
    plan = found(4)["uneven"][0]["plan"]
    assert [s.links for s in plan.stages] == [0, 3, 2, 0]
    assert [s.text for s in plan.stages][1:3] == ["weight^3/sigma^3", "weight^2/sigma^2"]
    assert all(got["plan"] == plan for got in found(4)["uneven"])


def test_a_stage_of_preln_sends_nothing_of_its_highway(found):
    state = 2 * 2 * pipelines.STEPS * pipelines.WIDTH * 8  # micro-batches of two
    ranks = found(4)["preln_k1_g0.2"]
    assert [r["rounds"] for r in ranks] == [1, 1, 1, 0]
    # The head once, and v of three other ranks per round; post-LN's P counts as one more round.
    assert [r["bytes"] for r in ranks] == [state * 4] * 3 + [0]
    assert [r["bytes"] for r in found(4)["postln_k1_g0.2"]] == [state * 7] * 3 + [0]


def test_no_more_rounds_than_backprop_takes(found):
    assert [r["rounds"] for r in found(4)["exact"]] == [0] * 4  # one stage after the other
    assert [r["rounds"] for r in found(4)["postln_k3_g0.2"]] == [0] * 4  # also here, where the result is the same


def test_a_product_that_overflows_goes_into_nothing_that_is_exact(found):
    stages, (x, target) = CASES[3]["overflows"].build(), CASES[3]["overflows"].data()
    loss_fn(nn.Sequential(*stages)(x), target).backward()
    for stage, got in zip(stages, found(3)["overflows"], strict=True):
        assert got["plan"].stages[1].has_highway
        for name, parameter in stage.named_parameters():
            torch.testing.assert_close(got["gradients"][name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_a_stage_without_highway_is_waited_for(found):
    plan = found(4)["no_highway_in_the_middle"][0]["plan"]
    assert plan.chains == (chains.Chain(2, 2), chains.Chain(0, 1))
    assert "no elementwise path" in plan.stages[2].reason


def test_buffers_are_written_once_a_micro_batch(found):
    for got in found(4)["batchnorm"]:
        assert got["buffers"]["0.norm.num_batches_tracked"] == 4
        assert all(b.isfinite().all() for b in got["buffers"].values())


def test_evaluation_is_the_forward_pass_alone(found):
    case, ranks = CASES[4]["batchnorm"], found(4)["batchnorm"]
    stages = case.build()
    for stage, got in zip(stages, ranks, strict=True):
        stage.load_state_dict(got["buffers"], strict=False)
    torch.testing.assert_close(ranks[-1]["evaluated"]["output"], nn.Sequential(*stages).eval()(case.data()[0]))
    assert all(got["evaluated"]["same"] for got in ranks)


def test_a_forward_pass_that_is_no_function_is_refused_on_every_rank(found):
    for got in found(4)["changing"]:
        assert "rank 2 (stage 2) failed: StageChanged: the stage's output, computed again" in got["error"]


def test_a_mask_between_stages_leaves_the_highway_what_it_is(found):
    assert all([s.text for s in got["plan"].stages] == ["0", "mask^2", "0"] for got in found(3)["mask_k0"])


def test_a_number_that_changed_where_no_module_keeps_it_is_told_of(found):
    for got in found(3)["annealed_elsewhere"]:
        assert "rank 1 (stage 1) failed: StageChanged: the stage's output, computed again" in got["error"]


def test_complex_activations_are_refused_on_every_rank(found):
    for got in found(3)["complex"]:
        assert "RankError" in got["error"] and "stage 0 sends or receives complex128 [2, 3, 5]" in got["error"]


def test_other_options_are_refused_on_every_rank(found):
    for got in found(4)["other_options"]:
        assert "RankError: ScheduleHighway: rank 1 has iterations = 2, rank 0 has 0" in got["error"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"iterations": -1},
            "ScheduleHighway: option 'iterations' = -1 (int) is not allowed; it takes an integer >= 0 or \"exact\" "
            "(ordinary backprop). Pass such a value, for example iterations=4, or leave it out.",
        ),
        ({"iterations": "auto"}, "'auto' (str) is not allowed; it takes a number or \"exact\""),
        ({"damping": 1.5}, "option 'damping' = 1.5 (float) is not allowed; it takes a number from 0 to 1. Pass"),
    ],
)
def test_a_bad_option_is_told_of_at_once(options, words):
    from hwbp_compiler.distributed import ScheduleHighway

    with pytest.raises(OptionError) as raised:
        ScheduleHighway(None, 1, **options)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "links", "multiplier", "once"),
    [(PreLN, 2, "1", 0), (PostLN, 2, "weight^2/sigma^2", 240), (ReLU, 2, "mask^2", 240), (Mixing, 0, "0", 0)],
)
def test_explain_tells_what_a_stage_is_without_any_process(kind, links, multiplier, once):
    from hwbp_compiler.distributed import explain

    stage = nn.Sequential(kind(), kind())
    report = explain(stage, torch.randn(2, 3, pipelines.WIDTH))
    assert (report.links, report.multiplier, report.once_bytes, report.state_bytes) == (links, multiplier, once, 240)
    assert ("exact, and waited for" in str(report)) is (kind is Mixing)
    assert all(p.grad is None for p in stage.parameters())


def test_a_stage_that_cannot_be_traced_is_exact_with_its_reason():
    from hwbp_compiler.distributed import explain

    class Branching(ReLU):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    report = explain(nn.Sequential(Branching()), torch.randn(2, 3, pipelines.WIDTH))
    assert report.reason.startswith("the stage cannot be traced")


def test_schedule_explains_itself(found):
    lines = found(4)["no_highway_in_the_middle"][0]["text"].splitlines()
    assert lines[0] == "stage 0 (rank 0, Sequential): next to the input; nothing crosses it"
    assert lines[1] == "stage 1 (rank 1, Sequential): a segment of 1 links, P = weight/sigma"
    assert lines[2].startswith("stage 2 (rank 2, Sequential): exact, and waited for: the state has no elementwise path")
    assert lines[3] == "stage 3 (rank 3, Sequential): holds the loss; exact"
    assert lines[4] == "stages 2 to 2: 1 segments, 0 rounds (ordinary backprop); 480 bytes a rank and round"


def test_doctests():
    assert doctest.testmod(chains).failed == 0


def test_fewer_ranks_than_stages_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage

    from hwbp_compiler.distributed import ScheduleHighway, StageError

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(StageError, match="there are 2 stages on 1 ranks; it takes one stage per rank"):
            ScheduleHighway(PipelineStage(PreLN(), 0, 2, torch.device("cpu")), 1, loss_fn=loss_fn)
    finally:
        dist.destroy_process_group()
