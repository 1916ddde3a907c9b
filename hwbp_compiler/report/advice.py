"""Try the advice out, so that the report never advises ``rewrite="always"`` for a chain that cannot be rewritten.

A chain that costs too much is declined before the rewrite is tried, and only the rewrite shows whether the chain can be
rewritten at all. So the report tries the rewrite on a copy of the graph. This takes as long as running the passes once
more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from hwbp_compiler import passes
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.options import Options

from .data import copy_of


def put_to_the_test(before: fx.GraphModule, records: Sequence[ChainRecord], options: Options) -> None:
    """Correct the advice of those ``records`` that would stay declined if a user followed it."""
    weighed = [record for record in records if _was_weighed(record, options)]
    for iterations in dict.fromkeys(_fewer(record, options) for record in weighed):
        trial = copy_of(before.graph)
        chosen = dataclasses.replace(options, iterations=iterations, rewrite="always", strict=False)
        found = passes.run(trial.graph, chosen)
        for record in (r for r in weighed if _fewer(r, options) == iterations):
            same = [other for other in found if _key(other) == _key(record)]
            if same and all(other.decision == "declined" for other in same):
                what = 'rewrite="always"' if iterations == options.iterations else "Fewer iterations"
                record.advice = f"{what} would not change this: {same[0].reason}. {same[0].advice}"


def _was_weighed(record: ChainRecord, options: Options) -> bool:
    """Whether the chain was declined for its cost or its iterations, so that the advice is to change these options."""
    if record.decision == "rewritten" or record.failed or not record.members or record.length < options.min_length:
        return False
    if record.length < 2 or options.needed(record.length) == 0:
        return False  # the advice names no iterations
    return options.rewrite != "always" or _fewer(record, options) != options.iterations


def _fewer(record: ChainRecord, options: Options) -> int:
    most = options.needed(record.length) - 1
    return most if options.iterations == "exact" else min(options.numbers.iterations, most)


def _key(record: ChainRecord) -> tuple[Any, ...]:
    return record.length, record.source, record.module, record.multiplier
