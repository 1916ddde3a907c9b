"""The report as data. Other files turn it into text, pages and drawings."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.options import Options


def copy_of(graph: fx.Graph) -> fx.GraphModule:
    """A separate module that holds a copy of ``graph``."""
    assert graph.owning_module is not None
    return fx.GraphModule(graph.owning_module, copied(graph), "JointGraph")


def copied(graph: fx.Graph) -> fx.Graph:
    with warnings.catch_warnings():  # torch warns here about its own copying of the inputs' layout
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(graph)


@dataclass
class BlockPrograms:
    """The code of one group of a chain, as readable text.

    forward   the user's source lines of one block, ``file:line: code``, in the order they run
    before    the backward pass of one block in ordinary backprop
    example   number of the link that this block belongs to, from 1, in forward order
    after     the backward pass of all blocks of the group at once; "" if the chain is not rewritten
    """

    forward: list[str] = field(default_factory=list)
    before: str = ""
    after: str = ""
    example: int = 1


@dataclass
class ErrorAt:
    """How near the parameter gradient of w^k is to the exact one, over all parameters of one joint graph together.

    Attributes:
        iterations: k.
        cosine: of the angle between the two gradients.
        relative_error: norm of their difference, divided by the norm of the exact gradient.
        segment: S, links per segment.
    """

    iterations: int
    cosine: float
    relative_error: float
    segment: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Values that overflowed become None, because JSON cannot represent them."""
        return {key: value if math.isfinite(value) else None for key, value in asdict(self).items()}


@dataclass
class ExplainedGraph:
    """One joint graph (forward and backward of one piece of the model).

    before, after   the graph as traced, and after the passes
    chains          the chains found in it
    failure         the exception that stopped the passes (the graph is then compiled unchanged), or None
    programs        for each chain, one entry per group
    rest            for each chain, the rewritten code that belongs to no group: multipliers, scans, states
    errors          the error of w^k for several k and S; empty unless it was requested
    loops           the first ``loops`` chains are loops of ``hwbp_compiler.recurrent``. These are rewritten before the
                    joint graph is traced, so ``before`` shows them in rewritten form too
    """

    before: fx.GraphModule
    after: fx.GraphModule
    chains: list[ChainRecord] = field(default_factory=list)
    failure: str | None = None
    programs: list[list[BlockPrograms]] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    errors: list[ErrorAt] = field(default_factory=list)
    loops: int = 0


@dataclass
class StepTimes:
    """Median seconds of one training step (forward, loss, backward) on the inputs given to ``explain``.

    Attributes:
        inductor: with ``backend="inductor"``.
        highway: with ``backend="highway"`` and the options given.
    """

    inductor: float
    highway: float


@dataclass
class ReportData:
    """What :func:`hwbp_compiler.explain` found.

    options    the highway's own options that were used
    graphs     one entry per joint graph, in the order they were traced; several if Dynamo split the model
    notes      remarks about the whole model, for example why there is no graph
    measured   step times, if they were requested
    name       the name of the model's class or function
    """

    options: Options
    graphs: list[ExplainedGraph]
    notes: list[str] = field(default_factory=list)
    measured: StepTimes | None = None
    name: str = "model"

    @property
    def chains(self) -> list[ChainRecord]:
        """All chains of all graphs, including the declined ones."""
        return [chain for graph in self.graphs for chain in graph.chains]

    @property
    def graph_before(self) -> fx.GraphModule | None:
        """A joint graph as traced, or None if there is none. If there are several, it is the first with a rewritten
        chain, else the first with any chain, else the first of all. ``print_readable()`` prints it.
        """
        graph = self.shown()
        return None if graph is None else graph.before

    @property
    def graph_after(self) -> fx.GraphModule | None:
        """The graph of ``graph_before`` after the passes, as Inductor would compile it."""
        graph = self.shown()
        return None if graph is None else graph.after

    def shown(self) -> ExplainedGraph | None:
        rewritten = (g for g in self.graphs if any(c.decision == "rewritten" for c in g.chains))
        with_chains = (g for g in self.graphs if g.chains)
        return next(rewritten, None) or next(with_chains, None) or next(iter(self.graphs), None)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON.

        Returns:
            A dict with ``options``, ``notes``, ``measured``, ``graphs``, and ``chains``, each with the number of its
            graph. Times are in seconds, sizes in bytes.
        """
        return {
            "options": asdict(self.options),
            "notes": list(self.notes),
            "measured": None if self.measured is None else asdict(self.measured),
            "graphs": [
                {
                    "nodes_before": len(graph.before.graph.nodes),
                    "nodes_after": len(graph.after.graph.nodes),
                    "chains": len(graph.chains),
                    "failure": graph.failure,
                    "errors": [error.to_dict() for error in graph.errors],
                }
                for graph in self.graphs
            ],
            "chains": [
                {"graph": number, **chain.to_dict()}
                for number, graph in enumerate(self.graphs)
                for chain in graph.chains
            ],
        }
