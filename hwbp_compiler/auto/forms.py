"""One graph in every form that was requested, each compiled when it is first needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule

from hwbp_compiler.cost.ladder import Rung
from hwbp_compiler.counting import count
from hwbp_compiler.errors import HighwayError, first_line
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.joint_pass import warn_once
from hwbp_compiler.options import Options, Truncation
from hwbp_compiler.prepare import Prepared, prepare
from hwbp_compiler.torch_private import CONTROL_FLOW, CustomGraphPass, compile_fx, compile_fx_inner

from .changes import Changes
from .check import CheckedPass
from .halves import CheckedHalves
from .measured import Check
from .observe import copied
from .source import Guards, Source

log = logging.getLogger(__name__)

Compile = Callable[..., Callable[..., Any]]
Seen = Callable[[Callable[[], Check] | None], None]


class Forms:
    """``compile(module, inputs, options)`` is the backend's compilation. ``options`` contain numbers, not "auto"."""

    def __init__(self, source: Source, compile: Compile) -> None:
        self.source, self.compile = source, compile
        self.made: dict[Options, tuple[Callable[..., Any], Guards] | None] = {}
        self.changes: dict[Options, Changes] = {}  # of the forms that are watched

    def keep(self, options: Options, form: Callable[..., Any]) -> None:
        """Keep a form that Dynamo's own compilation made. Dynamo checks its guards."""
        self.made[options] = form, Guards(self.source)

    def has(self, options: Options, values: Sequence[Any]) -> bool:
        """Whether the form is valid for these inputs. Compiles it first if needed; if that fails, the form is given up
        for good.
        """
        if options not in self.made:
            self.made[options] = self._compiled(options)
        found = self.made[options]
        return found is not None and found[1].hold(values)

    def run(self, options: Options, values: Sequence[Any], otherwise: Callable[..., Any] | None = None) -> Any:
        """Run the form. Use exact gradients if it cannot be compiled or is not valid for these inputs; if those cannot
        be compiled either, use ``otherwise``. Raises HighwayError if there is no ``otherwise``.
        """
        if not self.has(options, values):
            options = options.exactly()
            if not self.has(options, values):
                if otherwise is None:
                    raise HighwayError("this graph cannot be compiled with exact gradients for these inputs")
                return otherwise(*values)
        found = self.made[options]
        assert found is not None
        return found[0](*values)

    def late(self, options: Options, looking: Checks | Changes | None = None) -> tuple[Callable[..., Any], Guards]:
        """Compile after Dynamo has finished. Also return the guards on sizes."""
        how = {} if looking is None else {"looking": looking.of}
        with self.source.guarded() as guards:
            form = self.source.compiled(lambda module, inputs: self.compile(module, inputs, options, **how))
        return form, guards

    def _compiled(self, options: Options) -> tuple[Callable[..., Any], Guards] | None:
        if options.watched:
            self.changes[options] = Changes()
        try:
            return self.late(options, self.changes.get(options))
        except (HighwayError, *CONTROL_FLOW):
            raise
        except Exception as error:
            if options.strict:
                raise
            count("failures")
            exact = options.iterations == "exact"
            what = "exact backprop" if exact else f"the form {options.numbers}"
            warn_once(first_line(error), f"compiling {what} failed", "the steps have exact gradients")
            log.debug("where it failed", exc_info=error)
            return None


@dataclass
class Checks:
    """A compilation that compares the ``given`` forms, or else the ladder of the graph.

    ``seen`` receives what each backward pass finds.
    """

    forms: Forms
    seen: Seen
    given: tuple[Truncation, ...] = ()
    hands_out: Truncation | None = None
    progress: Callable[[], Any] | None = None
    rewrite: CheckedPass | None = None

    def of(self, options: Options, prepared: Prepared) -> Checks:
        """Called when the graph has been prepared."""
        loops = bool(self.given and prepared.loops) or any(record.candidates for record in prepared.records)
        self.rewrite = CheckedPass(
            options, prepared.records, given=self.given, hands_out=self.hands_out,
            retraced=self._retraced if loops else None, progress=self.progress, names=self.forms.source.names,
        )  # fmt: skip
        return self

    @property
    def highway(self) -> CheckedPass:
        """The pass, once the graph has been prepared."""
        assert self.rewrite is not None
        return self.rewrite

    @property
    def rungs(self) -> list[Rung]:
        """The forms compared; empty if the compilation is exact backprop only."""
        return self.rewrite.rungs if self.rewrite is not None else []

    def give_up(self) -> None:
        """The compilation failed."""
        self.rewrite = None

    def inner_compile(self, otherwise: Callable[..., Any] | None) -> Callable[..., Any]:
        """Replaces Inductor's compiler of forward and backward graphs."""
        halves = CheckedHalves(self.highway, lambda found: self.seen(found))

        def compile(module: GraphModule, example_inputs: Any, **how: Any) -> Callable[..., Any]:
            if self.rungs:
                return halves.compile(module, example_inputs, **how)
            return (otherwise or compile_fx_inner())(module, example_inputs, **how)

        return compile

    def _retraced(self, options: Options) -> tuple[Graph, Sequence[ChainRecord]]:
        """The joint graph with its loops as in ``options``."""
        found: list[Graph] = []
        records: list[ChainRecord] = []

        def trace(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            prepared = prepare(module, options)
            records.extend(prepared.records)
            if failed := [record for record in prepared.records if record.failed]:
                raise HighwayError(failed[0].reason)  # the loop would be unrolled, which takes too long
            return compile_fx(module, inputs, {"joint_custom_pre_pass": _Keeping(found)}, inner_compile=_no_code)

        self.forms.source.compiled(trace)
        return found[0], records


@dataclass(frozen=True)
class _Keeping(CustomGraphPass):
    """Keeps a copy of the joint graph."""

    found: list[Graph]

    def __call__(self, graph: Graph) -> None:
        self.found.append(copied(graph))

    def uuid(self) -> None:
        return None


def _no_code(module: GraphModule, example_inputs: Any, **how: Any) -> Callable[..., Any]:
    return module.forward
