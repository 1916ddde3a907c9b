"""The entry point: Inductor with one more pass over the joint graph."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

# Loaded with the backend, not with the first pass: they bring the operators that rewritten graphs call, and a
# graph found in torch.compile's caches runs no pass.
from . import passes
from .counting import count
from .digest import source_digest
from .errors import HighwayError, first_line
from .graph.info import is_tangent
from .graph.old_values import keep_old_values
from .graph.record import ChainRecord
from .options import Options, parse
from .passes.decide import at_full_length, cores
from .passes.replace_recurrent_modules import replace_recurrent_modules
from .passes.rewrite_recurrent_modules import record_nothing
from .passes.write_out_cells import write_out_cells
from .pieces import keeping_pieces
from .recurrence import packed
from .recurrence.tracing import traced_whole
from .rolled.capture import replace_loops, rolled
from .skipped import Compiled
from .torch_private import (
    CONTROL_FLOW,
    SERVES,
    CustomGraphPass,
    compile_fx,
    configure_backend,
    ddp_cuts_graphs,
    observed,
    registered_by_any_thread,
    trace_artifact,
    user_joint_passes,
    watch_graph_breaks,
    watch_nested,
    without_layout_optimization,
)

if TYPE_CHECKING:
    from .rolled.recurrence import Recurrence

log = logging.getLogger(__name__)

_EAGER = "this graph runs in eager mode, with exact gradients"
_UNCHANGED = "this graph is compiled as Inductor would compile it"


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
    patches = keeping_pieces(given)
    in_the_way = gm.graph.find_nodes(op="call_function", target=rolled)  # stand for loops, and cannot be run
    loops: list[Recurrence] = []
    try:
        register_lowerings()
        loops += replace_loops(gm, ours, lambda own: parse(own)[0])
        in_the_way = []
        replace_recurrent_modules(gm, ours)
        report_all(record for loop in loops for record in loop.records)
    except (HighwayError, *CONTROL_FLOW):
        raise
    except Exception as error:
        count("failures")
        if in_the_way:
            raise HighwayError(
                f"a loop of hwbp_compiler.recurrent could not be built ({first_line(error)}): a defect of ours, "
                "please report it with the cell. A Python loop over the cell trains all the same."
            ) from error
        if ours.strict:
            raise _as_highway_error("preparing the graph failed", error, _EAGER) from error
        _warn_once(first_line(error), "preparing the graph failed", _EAGER)
        log.debug("where it failed", exc_info=error)
        return _in_eager_mode(gm, loops)  # Dynamo's code as it was: half a change of the graph is not compiled into it
    if ours.rewrite == "never":
        return compile_fx(gm, example_inputs, patches)
    if ddp_cuts_graphs():
        _warn_of_cuts()
    ourselves = HighwayPass(ours, tuple(record for loop in loops for record in loop.records))
    rewriting = {**patches, "joint_custom_pre_pass": _in_sequence(*user_joint_passes(patches), ourselves)}
    how: dict[str, Any] = {}
    if any(isinstance(value, torch.SymInt) for value in example_inputs) and "layout_optimization" not in given:
        # Seen in torch 2.13 on CPUs: a view that is kept for the backward pass and goes into a convolution, as our
        # stacks do, makes Inductor compare symbolic strides, which raises. Elsewhere it does without by itself.
        how["inner_compile"] = without_layout_optimization(
            lambda: any(r.decision == "rewritten" for r in ourselves.told)
        )
    # Inductor changes the graph it is given; what is tried next starts from here.
    copied = torch.fx.Graph()
    copied.output(copied.graph_copy(gm.graph, {}))
    again = torch.fx.GraphModule(gm, copied)
    try:
        write_out_cells(gm)
        return compile_fx(gm, example_inputs, rewriting, **how)
    except (HighwayError, *CONTROL_FLOW):
        raise
    except Exception as error:
        count("failures")
        if ours.strict:
            raise _as_highway_error("compiling the rewritten graph failed", error, f"{_UNCHANGED} if it can") from error
        _take_back(ourselves.told)
        return _less_compiled(again, example_inputs, patches, loops, error)


def _less_compiled(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    patches: Mapping[str, Any],
    loops: Sequence[Recurrence],
    error: Exception,
) -> Callable[..., Any]:
    """Without the rewrite; in eager mode where that fails too (no C++ compiler, say, or a loop that is at fault)."""
    reason = first_line(error)
    log.debug("where it failed", exc_info=error)
    eager = torch.fx.GraphModule(gm, gm.graph)
    try:
        compiled = compile_fx(gm, example_inputs, patches)
    except CONTROL_FLOW:
        raise
    except Exception as second:
        log.debug("where it failed without the rewrite", exc_info=second)
        _warn_once(reason, "compiling failed", _EAGER)
        _take_back(record for loop in loops for record in loop.records)
        return _in_eager_mode(eager, loops)
    _warn_once(reason, "compiling the rewritten graph failed")
    return compiled


def _in_eager_mode(gm: torch.fx.GraphModule, loops: Iterable[Recurrence]) -> Callable[..., Any]:
    """As the user wrote it, loops over time too: nothing of what may have failed is tried again."""
    for loop in loops:
        loop.step_through()
    return gm.forward  # type: ignore[no-any-return]


def _take_back(records: Iterable[ChainRecord]) -> None:
    """What was rewritten is not compiled after all: count it as declined."""
    undone = sum(record.decision == "rewritten" for record in records)
    if undone:
        count("chains_rewritten", -undone)
        count("chains_declined", undone)
        count("declined: the rewritten graph could not be compiled", undone)


def _as_highway_error(what: str, error: Exception, instead: str = _UNCHANGED) -> HighwayError:
    frame = inspect.currentframe()
    return HighwayError(
        f"{what} and strict=True: {type(error).__name__}: {error}. Without strict=True {instead}.",
        inner_exception=error,
        first_useful_frame=frame and frame.f_back,
    ).with_traceback(error.__traceback__)


setattr(highway, SERVES, True)


def register_lowerings() -> None:
    """Inductor's side of our operators. Here, not at import: it loads Inductor."""
    from .scan import inductor

    inductor.register()


def _context(
    mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[[], AbstractContextManager[Any]]:
    """What a callable that is being compiled with these runs in. Raises OptionError."""
    return functools.partial(traced_whole, Compiled(strict=parse(options, mode)[0].strict))


# torch.compile gives the options to this at once, and to the backend only with the first graph.
configure_backend(highway, _context)
watch_graph_breaks(packed.seen)
registered_by_any_thread(highway)
watch_nested(highway, lambda inner, outer: _look_for_dropped(inner, outer))


@dataclass(frozen=True)
class HighwayPass(CustomGraphPass):
    """The rewrites of ``hwbp_compiler.passes`` as one pass of Inductor's over the joint graph. ``loops``: what was
    decided about those of ``hwbp_compiler.recurrent`` before, for the report."""

    options: Options
    loops: tuple[ChainRecord, ...] = field(default=(), compare=False, repr=False)
    told: list[ChainRecord] = field(default_factory=list, init=False, compare=False, repr=False)

    def __call__(self, graph: torch.fx.Graph) -> None:
        count("graphs_seen")
        if not any(is_tangent(node) for node in graph.nodes):
            count("inference_graphs")
            record_nothing(graph)
            return
        nodes = len(graph.nodes)
        trace_artifact("highway_joint_graph_before", lambda: _readable(graph))
        untouched = torch.fx.Graph()
        output = untouched.graph_copy(graph, {})
        try:
            records = observed(graph, "highway", lambda graph: passes.run(graph, self.options))
        except Exception as error:
            count("failures")
            if self.options.strict:
                raise _as_highway_error("the highway rewrite failed", error) from error
            _restore(graph, untouched, output)
            keep_old_values(graph)
            _warn_once(f"{type(error).__name__}: {error}")
            log.debug("where it failed", exc_info=error)
            return
        if records is None:  # config.disabled_passes names it
            log.info('switched off by torch._inductor.config.disabled_passes = "highway"')
            return
        trace_artifact("highway_joint_graph_after", lambda: _readable(graph))
        told = [*self.loops, *records]
        trace_artifact("highway_report", lambda: _report(told, nodes, len(graph.nodes)))
        log.debug("joint graph of %d nodes: %d chains", nodes, len(records))
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", _report(told, nodes, len(graph.nodes)))
        report_all(records)
        self.told.extend(records)

    def uuid(self) -> str:
        """Changes with every option, every source file of the package, the torch version, and the number of cores,
        which the cost model reads."""
        full = " at full length" if at_full_length.get() else ""
        return f"{source_digest()} {self.options} torch {torch.__version__} cores {cores()}{full}"


@dataclass(frozen=True)
class PassSequence(CustomGraphPass):
    """Several joint passes as one, first to last: torch 2.11 has room for a single one."""

    passes: tuple[Callable[[torch.fx.Graph], Any], ...]

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> tuple[Any, ...] | None:
        """None, which keeps the graph out of the caches, unless every pass can tell what it is."""
        uuids = tuple(each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes)
        return uuids if all(uuids) else None


def _in_sequence(*parts: Callable[[torch.fx.Graph], Any]) -> Callable[[torch.fx.Graph], Any]:
    return parts[0] if len(parts) == 1 else PassSequence(parts)


def _readable(graph: torch.fx.Graph) -> str:
    module = graph.owning_module
    return _whatever_happens(lambda: "" if module is None else module.print_readable(print_output=False))


def _report(records: list[ChainRecord], before: int, after: int) -> str:
    from .report.text import graph_text  # brings what explain needs

    return _whatever_happens(lambda: graph_text(records, before, after))


def _whatever_happens(text: Callable[[], str]) -> str:
    """Telling what was done must not undo it."""
    try:
        return text()
    except Exception as error:
        return f"not shown, {type(error).__name__}: {error}"


def report_all(records: Iterable[ChainRecord]) -> None:
    """Count and log what was decided."""
    for record in records:
        count("chains_found")
        count(f"chains_{record.decision}")
        if record.failed:
            count("failures")
            _warn_once(record.reason)
        if record.decision == "declined":
            count(f"declined: {record.reason.partition(':')[0]}")  # without the figures behind the colon
        where = "; ".join(filter(None, (record.module, record.source)))
        where = f" [{where}]" if where else ""
        log.info("chain of %d links %s: %s%s", record.length, record.decision, record.reason, where)


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


@functools.cache
def _warn_once(
    reason: str,
    what: str = "the highway rewrite failed",
    instead: str = _UNCHANGED,
) -> None:
    log.warning(
        '%s (%s); %s. options={"strict": True} raises instead, TORCH_LOGS="+hwbp_compiler" shows where.',
        what,
        reason,
        instead,
    )


def _restore(graph: torch.fx.Graph, untouched: torch.fx.Graph, output: Any) -> None:
    """Put ``untouched``, a copy without its output node, in place of whatever a failed pass has left."""
    metadata = dict(next(n for n in reversed(graph.nodes) if n.op == "output").meta)
    for node in reversed(list(graph.nodes)):
        graph.erase_node(node)
    moved: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.graph_copy(untouched, moved)
    graph.output(torch.fx.map_arg(output, moved.__getitem__)).meta.update(metadata)
