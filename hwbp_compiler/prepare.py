"""Change Dynamo's graph before AOTAutograd sees it: replace what autograd would take apart, or cannot take apart.

Loops of ``hwbp_compiler.recurrent`` become calls of a :class:`~.rolled.recurrence.Recurrence`; nn.GRU and its like
become ``highway::recurrent_module``; fused cells are written out. The backend, ``explain``, ``generate_code`` and
``testing`` all prepare here, so that all see the same graph.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch.fx import Graph, GraphModule

from .errors import HighwayError, first_line
from .graph.record import ChainRecord
from .options import Options, parse
from .passes.replace_recurrent_modules import replace_recurrent_modules
from .passes.write_out_cells import write_out_cells
from .reroll import reroll_loops
from .rolled.replace_loops import replace_loops, rolled
from .torch_private import CONTROL_FLOW

if TYPE_CHECKING:
    from .rolled.recurrence import Recurrence

log = logging.getLogger(__name__)


@dataclass
class Prepared:
    """What was done to a graph.

    loops      the loops in it, already decided: first those of ``hwbp_compiler.recurrent`` in graph order, then the
               Python loops that were rolled up again
    plain      a copy in which cells are not written out; it is compiled if the rewrite fails
    unrolled   records of the Python loops that stay unrolled
    """

    loops: Sequence[Recurrence]
    plain: GraphModule
    unrolled: Sequence[ChainRecord] = ()

    @property
    def records(self) -> tuple[ChainRecord, ...]:
        """The decisions about the loops."""
        return (*(record for loop in self.loops for record in loop.records), *self.unrolled)


def _of_a_loop(own: Mapping[str, Any], outer: Options) -> Options:
    """A loop's ``own`` options inside a function compiled with ``outer``: the loop takes k, S and gamma from the
    function if it sets none itself.
    """
    said = parse(own)[0]
    if "iterations" not in own:
        outers = {key: getattr(outer, key) for key in ("iterations", "segment", "damping") if key not in own}
        said = replace(said, **outers)
    if said.auto and not outer.auto:
        _warn_of_auto()
    return said


@functools.cache
def _warn_of_auto() -> None:
    log.warning(
        'A loop of hwbp_compiler.recurrent has "auto" among its options, and the function it is compiled in has '
        "numbers. Checks compare whole functions: the loop keeps exact gradients. Give the loop numbers, or the "
        'function "auto".'
    )


class PreparationFailed(HighwayError):
    """The graph is half changed: it may run in eager mode, with ``loops`` in it, but must not be compiled."""

    def __init__(self, reason: Exception, loops: Sequence[Recurrence]) -> None:
        super().__init__(f"preparing the graph failed: {first_line(reason)}", inner_exception=reason)
        self.reason, self.loops = reason, loops


def prepare(gm: GraphModule, options: Options, of_loops: Options | None = None) -> Prepared:
    """Prepare ``gm``, a graph from Dynamo, in place.

    ``of_loops`` replaces every loop's own options. Raises HighwayError if a loop cannot be built, since nothing is left
    that could run, and PreparationFailed for any other failure.
    """
    loops: list[Recurrence] = []
    try:
        loops += replace_loops(gm, of_loops or options, lambda own: of_loops or _of_a_loop(own, options))
        python_loops = reroll_loops(gm, of_loops or options)
        loops += python_loops.loops
        replace_recurrent_modules(gm, options)
        copied = Graph()
        copied.output(copied.graph_copy(gm.graph, {}))
        prepared = Prepared(loops, GraphModule(gm, copied), python_loops.records)
        if options.rewrite != "never" or of_loops is not None:
            write_out_cells(gm)
    except (HighwayError, *CONTROL_FLOW):
        raise
    except Exception as error:
        if gm.graph.find_nodes(op="call_function", target=rolled):  # a placeholder for a loop, which cannot be run
            raise HighwayError(
                f"a loop of hwbp_compiler.recurrent could not be built ({first_line(error)}). This is a "
                "bug in hwbp_compiler: please report it with the cell. A Python loop over the cell still trains."
            ) from error
        raise PreparationFailed(error, loops) from error
    return prepared
