"""The rewrite as one of Inductor's passes over the joint graph, with counting and logging."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from . import passes
from .cost.devices import cores
from .cost.probe import digest
from .counting import count
from .digest import source_digest
from .errors import HighwayError, first_line
from .graph.info import is_tangent
from .graph.old_values import keep_old_values
from .graph.record import ChainRecord
from .graph.snapshot import Snapshot
from .options import Options
from .passes.rewrite_recurrent_modules import record_nothing
from .reasons import Reason
from .torch_private import CustomGraphPass, observed, trace_artifact

log = logging.getLogger(__name__)

UNCHANGED = "this graph is compiled as Inductor would compile it"


@dataclass(frozen=True)
class HighwayPass(CustomGraphPass):
    """Runs the rewrites of ``hwbp_compiler.passes`` as one of Inductor's passes over the joint graph.

    loops     earlier decisions about the loops of ``hwbp_compiler.recurrent``, for the report
    quiet     count and log nothing: the caller only looks at what would be compiled
    records   the decisions about the chains
    """

    options: Options
    loops: tuple[ChainRecord, ...] = field(default=(), compare=False, repr=False)
    quiet: bool = field(default=False, compare=False, repr=False)
    records: list[ChainRecord] = field(default_factory=list, init=False, compare=False, repr=False)

    def __call__(self, graph: torch.fx.Graph) -> None:
        self._count("graphs_seen")
        if not any(is_tangent(node) for node in graph.nodes):
            self._count("inference_graphs")
            record_nothing(graph)
            return
        nodes = len(graph.nodes)
        trace_artifact("highway_joint_graph_before", lambda: _readable(graph))
        before = Snapshot(graph)
        try:
            records = observed(graph, "highway", lambda graph: passes.run(graph, self.options))
        except Exception as error:
            self._count("failures")
            if self.options.strict:
                raise as_highway_error("the highway rewrite failed", error) from error
            before.restore()
            keep_old_values(graph)
            warn_once(first_line(error))
            log.debug("where it failed", exc_info=error)
            return
        if records is None:  # disabled in config.disabled_passes
            log.info('switched off by torch._inductor.config.disabled_passes = "highway"')
            return
        trace_artifact("highway_joint_graph_after", lambda: _readable(graph))
        reported = [*self.loops, *records]
        trace_artifact("highway_report", lambda: _report(reported, nodes, len(graph.nodes)))
        log.debug("joint graph of %d nodes: %d chains", nodes, len(records))
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", _report(reported, nodes, len(graph.nodes)))
        if not self.quiet:
            report_all(records)
        self.records.extend(records)

    def _count(self, what: str) -> None:
        if not self.quiet:
            count(what)

    def uuid(self) -> str:
        """Changes with every option, every source file of the package, the torch version, the number of cores, and
        what was measured on the devices: the cost model reads both.
        """
        return f"{source_digest()} {self.options} torch {torch.__version__} cores {cores()} {digest()}"


def _readable(graph: torch.fx.Graph) -> str:
    module = graph.owning_module
    return _whatever_happens(lambda: "" if module is None else module.print_readable(print_output=False))


def _report(records: list[ChainRecord], before: int, after: int) -> str:
    from .report.text import graph_text  # imported here: it loads everything explain needs

    return _whatever_happens(lambda: graph_text(records, before, after))


def _whatever_happens(text: Callable[[], str]) -> str:
    """Return ``text()``; a report that fails must not undo the compilation."""
    try:
        return text()
    except Exception as error:
        return f"not shown, {type(error).__name__}: {error}"


# -- what is counted and logged ----------------------------------------------------------------------------------


def report_all(records: Iterable[ChainRecord]) -> None:
    """Count and log the decisions."""
    for record in records:
        count("chains_found")
        count(f"chains_{record.decision}")
        if record.failed:
            count("failures")
            warn_once(record.reason)
        if record.decision == "declined":
            count(f"declined: {record.reason_code.name.lower()}" if record.reason_code else "declined")
        where = "; ".join(filter(None, (record.module, record.source)))
        where = f" [{where}]" if where else ""
        log.info("chain of %d links %s: %s%s", record.length, record.decision, record.reason, where)


def take_back(records: Iterable[ChainRecord]) -> None:
    """Count rewritten chains as declined: the rewritten graph is not used after all."""
    undone = sum(record.decision == "rewritten" for record in records)
    if undone:
        count("chains_rewritten", -undone)
        count("chains_declined", undone)
        count(f"declined: {Reason.NOT_COMPILED.name.lower()}", undone)


@functools.cache
def warn_once(
    reason: str,
    what: str = "the highway rewrite failed",
    instead: str = UNCHANGED,
) -> None:
    log.warning(
        '%s (%s); %s. options={"strict": True} raises instead, TORCH_LOGS="+hwbp_compiler" shows where.',
        what,
        reason,
        instead,
    )


def as_highway_error(what: str, error: BaseException, instead: str = UNCHANGED) -> HighwayError:
    frame = inspect.currentframe()
    return HighwayError(
        f"{what} and strict=True: {type(error).__name__}: {error}. Without strict=True {instead}.",
        inner_exception=error,
        first_useful_frame=frame and frame.f_back,
    ).with_traceback(error.__traceback__)
