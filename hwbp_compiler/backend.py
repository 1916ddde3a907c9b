"""The entry point: Inductor with one more pass over the joint graph."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

# Imported with the backend and not with the first pass: these modules register the operators that rewritten graphs
# call, and no pass runs when torch.compile finds a graph in its caches.
from . import graph_breaks
from .auto.source import Source
from .auto.variants import Variants
from .counting import count
from .errors import HighwayError, first_line
from .joint_pass import UNCHANGED, HighwayPass, as_highway_error, report_all, take_back, warn_once
from .options import Options, parse
from .pass_sequence import in_sequence
from .pieces import keeping_pieces
from .prepare import PreparationFailed, Prepared, prepare
from .recurrence import packed
from .recurrence.tracing import traced_whole
from .scan import register_lowerings
from .skipped import Compiled
from .torch_private import (
    CONTROL_FLOW,
    SERVES,
    compile_fx,
    configure_backend,
    ddp_cuts_graphs,
    registered_by_any_thread,
    user_joint_passes,
    watch_nested,
    without_layout_optimization,
)

if TYPE_CHECKING:
    from .auto.changes import Changes
    from .auto.forms import Checks
    from .rolled.recurrence import Recurrence

log = logging.getLogger(__name__)

_EAGER = "this graph runs in eager mode, with exact gradients"


def highway(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile ``gm`` with Inductor, its backward pass in Highway-BP form.

    The backend behind ``torch.compile(model, backend="highway", options={...})``. ``options`` are those of
    :class:`hwbp_compiler.Options` and all of Inductor's; ``mode`` means what it means to Inductor. Raises
    :class:`hwbp_compiler.OptionError` for anything else.
    """
    ours, given = parse(options, mode)
    if ours.rewrite == "never" or not torch.is_grad_enabled():
        return compiled_in_one_form(gm, example_inputs, ours, given)
    source = Source.of(gm, example_inputs)

    def compile(gm: torch.fx.GraphModule, inputs: list[Any], options: Options, **how: Any) -> Callable[..., Any]:
        return compiled_in_one_form(gm, inputs, options, given, **how)

    return Variants(source, gm, example_inputs, ours, compile)


def compiled_in_one_form(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    ours: Options,
    given: Mapping[str, Any],
    looking: Callable[[Options, Prepared], Checks | Changes] | None = None,
) -> Callable[..., Any]:
    """Compile one form of ``gm`` and change ``gm`` on the way. ``looking`` gives what measures something in its
    backward pass.
    """
    patches = keeping_pieces(given)
    loops: Sequence[Recurrence] = ()
    try:
        register_lowerings()
        prepared = prepare(gm, ours)
        loops = prepared.loops
        report_all(prepared.records)
    except PreparationFailed as error:
        return _unprepared(gm, ours, error.reason, error.loops)
    except (HighwayError, *CONTROL_FLOW):
        raise
    except Exception as error:
        return _unprepared(gm, ours, error, loops)
    if ours.rewrite == "never":
        return compile_fx(gm, example_inputs, patches)
    if ddp_cuts_graphs():
        _warn_of_cuts()
    measuring = None if looking is None else looking(ours, prepared)
    rewrite = HighwayPass(ours, prepared.records) if measuring is None else measuring.highway
    rewriting = {**patches, "joint_custom_pre_pass": in_sequence(*user_joint_passes(patches), rewrite)}
    how: dict[str, Any] = {}
    if any(isinstance(value, torch.SymInt) for value in example_inputs) and "layout_optimization" not in given:
        # Seen in torch 2.13 on CPUs: our stacks save a view for the backward pass that goes into a convolution, and
        # Inductor then compares symbolic strides, which raises. With static sizes Inductor skips that step by itself.
        how["inner_compile"] = without_layout_optimization(
            lambda: any(r.decision == "rewritten" for r in rewrite.records)
        )
    if measuring is not None:
        how["inner_compile"] = measuring.inner_compile(how.get("inner_compile"))
    try:
        return compile_fx(gm, example_inputs, rewriting, **how)
    except (HighwayError, *CONTROL_FLOW):
        raise
    except Exception as error:
        count("failures")
        if ours.strict:
            raise as_highway_error("compiling the rewritten graph failed", error, f"{UNCHANGED} if it can") from error
        take_back(rewrite.records)
        if measuring is not None:
            measuring.give_up()
        return _less_compiled(prepared.plain, example_inputs, patches, loops, error)


def _unprepared(
    gm: torch.fx.GraphModule, options: Options, error: Exception, loops: Sequence[Recurrence]
) -> Callable[..., Any]:
    """Run Dynamo's code in eager mode: the graph is half changed, so it must not be compiled."""
    count("failures")
    if options.strict:
        raise as_highway_error("preparing the graph failed", error, _EAGER) from error
    warn_once(first_line(error), "preparing the graph failed", _EAGER)
    log.debug("where it failed", exc_info=error)
    return _in_eager_mode(gm, loops)


def _less_compiled(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    patches: Mapping[str, Any],
    loops: Sequence[Recurrence],
    error: Exception,
) -> Callable[..., Any]:
    """Compile without the rewrite. If that fails too (no C++ compiler, or a loop is at fault), run in eager mode."""
    reason = first_line(error)
    log.debug("where it failed", exc_info=error)
    eager = torch.fx.GraphModule(gm, gm.graph)
    try:
        compiled = compile_fx(gm, example_inputs, patches)
    except CONTROL_FLOW:
        raise
    except Exception as second:
        log.debug("where it failed without the rewrite", exc_info=second)
        warn_once(reason, "compiling failed", _EAGER)
        take_back(record for loop in loops for record in loop.records)
        return _in_eager_mode(eager, loops)
    warn_once(reason, "compiling the rewritten graph failed")
    return compiled


def _in_eager_mode(gm: torch.fx.GraphModule, loops: Iterable[Recurrence]) -> Callable[..., Any]:
    """Run the code as the user wrote it, with its loops over time step by step. Nothing that may have failed is tried
    again.
    """
    for loop in loops:
        loop.step_through()
    return gm.forward  # type: ignore[no-any-return]


setattr(highway, SERVES, True)


def _context(
    mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[[], AbstractContextManager[Any]]:
    """The context in which a callable compiled with these options runs. Raises OptionError."""
    return functools.partial(traced_whole, Compiled(parse(options, mode)[0].strict, given=(options, mode)))


# torch.compile passes its options to this function at once, but to the backend only with the first graph.
configure_backend(highway, _context)
graph_breaks.watch(packed.count_and_tell)
registered_by_any_thread(highway)
watch_nested(highway, lambda inner, outer: _look_for_dropped(inner, outer))


def _look_for_dropped(inner: Mapping[str, Any], outer: Mapping[str, Any]) -> None:
    if parse(inner.get("options"), inner.get("mode")) != parse(outer.get("options"), outer.get("mode")):
        _warn_of_dropped(str(dict(inner)), str(dict(outer)))


@functools.cache
def _warn_of_dropped(inner: str, outer: str) -> None:
    log.warning(
        "Something compiled with %s is called inside something compiled with %s. Dynamo puts both into one graph, and "
        "the outer options hold for all of it. To keep the inner ones, break the graph: call it from a function that "
        "is decorated with torch.compiler.disable.",
        inner,
        outer,
    )


@functools.cache
def _warn_of_cuts() -> None:
    log.warning(
        "DistributedDataParallel makes torch.compile cut the model where a bucket of gradients is full, and with it "
        "every residual path that crosses such a place: the pieces are rewritten apart, or left exact where they are "
        "short. torch._dynamo.config.optimize_ddp = False keeps the model whole."
    )
