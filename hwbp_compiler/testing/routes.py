"""The ways in which the fuzzer computes the gradients of a random model, and the comparison with the oracle."""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal
from unittest import mock

import torch

from hwbp_compiler.torch_private import SkipFrame, functorch_config, inductor_config

from . import models
from .capture import capture, leaves_of, options, trace
from .cases import Setting
from .compare import total_norm
from .generated import APART, assert_same, built_alone, kernels_together, run_generated
from .judge import Verdict, judge
from .models import Model, Recurrence, Stack
from .modules import Loop
from .reference import reference_gradients

Route = Literal["trace", "dynamo", "rolled", "symbolic", "inductor", "generated"]
LINEAR = ("min_gru", "diagonal", "gates")  # cells whose gates do not see the state


def check(
    spec: Model, chosen: tuple[Setting, ...], route: Route = "trace", largest: float = float("inf")
) -> list[tuple[Verdict, list[Any]]]:
    """Assert that ``spec`` has the oracle's gradients under each setting.

    The result is empty if nothing in the model requires a gradient. Raises TooLarge if ``route`` is ``"generated"``
    and the joint graph has more than ``largest`` nodes, before or after rewriting.
    """
    model, args, loss = models.build(spec)
    if not any(leaf.requires_grad for leaf in leaves_of(model, args).values()):
        return []
    if route == "trace" and _in_place(spec):
        route = "dynamo"
    if route in ("rolled", "symbolic") and any(isinstance(s, Recurrence) and s.cell in LINEAR for s in spec.stacks):
        chosen = tuple(replace(setting, damping=0.0) for setting in chosen)  # rolled up, it is a scan without blocks
    if route == "generated":  # takes seconds each: use one setting, under which something is truncated
        chosen = (_below_length(spec, chosen[0]),)
    low = spec.dtype == "float32" or any(_casts(stage) for stage in spec.stacks)
    reference = copy.deepcopy(model).double()  # the same numbers
    wide_args = tuple(a.detach().double().requires_grad_(a.requires_grad) for a in args)
    # The compiler may leave loops alone if they have very few steps, or if they have no blocks and so are exact.
    loops = any(isinstance(stage, Recurrence) for stage in spec.stacks)
    found = []
    routes: dict[Route, Callable[..., Iterator[Any]]] = {
        "trace": _traced, "generated": functools.partial(_generated, largest=largest), "dynamo": _through_dynamo,
        "rolled": _rolled, "symbolic": _symbolic, "inductor": _through_inductor,
    }  # fmt: skip
    results = routes[route](spec, chosen)
    for setting, (output, gradients, records) in zip(chosen, results, strict=True):
        tolerance = 1e-6
        if low:
            loose = _rounding(model, args, reference, wide_args, loss, setting)
            if not loose < 1e-3:
                continue  # float32 gives no information about this one
            tolerance = max(5e-3, 50 * loose)
        verdict = judge(
            models.programs(reference), wide_args, loss, _widened(output), gradients, records,
            iterations=setting.iterations, damping=setting.damping, segment=setting.segment,
            least=max(setting.min_length, 3), tails=not spec.pinned,
            tolerance=tolerance, noise=1e-4 if low else 1e-12, forward_tolerance=1e-3 if low else 1e-11,
        )  # fmt: skip
        found.append((verdict, records))
        assert not verdict.missed or loops or not spec.pinned, (
            f"{verdict.missed} chains were passed over without a record: of lengths {verdict.lengths}, "
            f"rewritten {verdict.rewritten}"
        )
        failed = [record.reason for record in records if record.failed]
        assert not failed, f"rewriting failed: {failed[0]}"
    return found


def _rounding(
    model: Any, args: tuple[Any, ...], reference: Any, wide_args: tuple[Any, ...], loss: Any, setting: Setting
) -> float:
    """The error of the oracle itself in float32: the worst relative error of any gradient that is not noise."""
    k, gamma, segment = setting.iterations, setting.damping, setting.segment
    pair = [
        reference_gradients(next(models.programs(m)), a, loss, k, gamma, segment=segment)[1]
        for m, a in ((model, args), (_other_rounding(reference), wide_args))
    ]
    whole = total_norm(pair[1])
    worst = 0.0
    for key, exact in pair[1].items():
        if float(exact.norm()) > 1e-3 * whole:
            worst = max(worst, float((pair[0][key].double() - exact).norm() / exact.norm()))
    return worst


def _other_rounding(model: Any) -> Any:
    """The same model with a float32 rounding error added to every parameter, so that casts inside round differently."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.0 + 1e-7 * torch.sign(torch.sin(1e3 * parameter)))
    return moved


def _casts(stage: models.Stage) -> bool:
    return isinstance(stage, Stack) and (stage.after == "cast" or "cast" in stage.blocks)


def _widened(output: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.double(), output)


def _below_length(spec: Model, setting: Setting) -> Setting:
    """The setting with k and S small enough that the shortest chain of ``spec`` is not exact."""
    length = min(spec.length if isinstance(stage, Recurrence) else stage.depth for stage in spec.stacks)
    segment = min(setting.segment, max(1, length // 2))
    runs = -(-length // segment)
    return replace(setting, segment=segment, iterations=setting.iterations % max(1, runs - 1))


def _options(setting: Setting) -> Any:
    return options(**vars(setting))


def _traced(spec: Model, chosen: tuple[Setting, ...]) -> Iterator[Any]:
    traced = trace(*models.build(spec))
    for setting in chosen:
        yield traced.gradients(_options(setting))


def _in_place(spec: Model) -> bool:
    """Whether ``spec`` has blocks that change something in place, which ``trace`` refuses."""
    return any(isinstance(stage, Stack) and "in_place" in stage.blocks for stage in spec.stacks)


def _generated(spec: Model, chosen: tuple[Setting, ...], largest: float) -> Iterator[Any]:
    if _in_place(spec):
        # Not in turns with other checks: torch.compile changes settings of the whole process while it runs.
        with kernels_together(), built_alone():
            yield from list(_through_inductor(spec, chosen))
        return

    def run_if_small(root: torch.fx.GraphModule, graph: torch.fx.Graph, inputs: list[Any]) -> Any:
        if len(graph.nodes) > largest:
            raise TooLarge
        return run_generated(root, graph, inputs)

    traced = trace(*models.build(spec))
    if len(traced.joint.module.graph.nodes) > largest:
        raise TooLarge
    for setting in chosen:
        yield traced.gradients(_options(setting), run_if_small)


class TooLarge(Exception):
    """A program that takes Inductor too long for a fuzzer."""


def _through_dynamo(spec: Model, chosen: tuple[Setting, ...]) -> Iterator[Any]:
    captured = capture(*models.build(spec), dynamic=spec.dynamic)
    for setting in chosen:
        yield captured.gradients(_options(setting))


def _rolled(spec: Model, chosen: tuple[Setting, ...]) -> Iterator[Any]:
    """Run through Dynamo, which unrolls the loops over time, and roll all loops up again. Sizes are static. Otherwise
    Dynamo may treat a size as a symbol until the first step shows that it is a number, and then the first step differs
    from the others.
    """
    captured = capture(*models.build(spec), dynamic=False)
    captured._options = options(reroll="always")
    for setting in chosen:
        yield captured.gradients(options(reroll="always", **vars(setting)))


def _symbolic(spec: Model, chosen: tuple[Setting, ...]) -> Iterator[Any]:
    """All sizes are symbols, also those of the weights, and loops call ``recurrent``."""
    model, args, loss = models.build(spec)
    for module in model.modules():
        if isinstance(module, Loop):
            module.rolled = True
    captured = capture(model, args, loss, dynamic=True, functional=True)
    for setting in chosen:
        yield captured.gradients(_options(setting))


def _through_inductor(spec: Model, chosen: tuple[Setting, ...]) -> Iterator[Any]:
    """Each setting is compiled twice, the second time for memory that is never reused. Both must agree."""
    for setting in chosen:
        result = _compiled_by_inductor(spec, setting)
        with inductor_config.patch(APART):
            _, apart, _ = _compiled_by_inductor(spec, setting)
        assert_same(result[1].values(), apart.values())
        yield result


def _compiled_by_inductor(spec: Model, setting: Setting) -> Any:
    from hwbp_compiler import passes

    model, args, loss = models.build(spec)
    records: list[Any] = []
    run = passes.run

    def noting(graph: Any, options: Any) -> Any:
        found = run(graph, options)
        records.extend(found)
        return found

    torch._dynamo.reset()
    _another_backend_first(spec)
    ours = {"strict": True, **vars(setting), "fx_graph_cache": False}
    with mock.patch.object(passes, "run", noting), functorch_config.patch(enable_autograd_cache=False):
        compiled = torch.compile(model, backend="highway", options=ours, dynamic=spec.dynamic or None)
        output = compiled(*args)
        leaves = leaves_of(model, args)
        found = torch.autograd.grad(loss(output), list(leaves.values()), allow_unused=True)
    gradients = {
        key: torch.zeros_like(leaf) if g is None else g for (key, leaf), g in zip(leaves.items(), found, strict=True)
    }
    return output, gradients, records


def _another_backend_first(spec: Model) -> None:
    """Compile half of the programs with another backend first. For half of these, Dynamo gives up on all the code."""
    lot = zlib.crc32(repr(spec).encode()[::-1]) % 4
    if lot < 2:
        model, args, _ = models.build(spec)
        try:
            torch.compile(model, backend="aot_eager" if lot else _gives_up)(*args)
        except RuntimeError as error:  # torch's aot_eager fails for some models that change slices in place
            if not (lot and _in_place(spec) and "view size is not compatible" in str(error)):
                raise


def _gives_up(module: Any, inputs: Any) -> Any:
    raise SkipFrame


__all__ = ["Route", "TooLarge", "check"]
