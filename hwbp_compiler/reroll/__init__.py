"""Python loops over time, which Dynamo unrolls, rolled up again: find the step that repeats, put one loop in its place.

``values``    what a node stands for: a part of what another one computes
``find``      where a graph repeats itself
``steps``     what a step takes from outside and from the steps before it; or why it is no loop
``series``    what the steps take and give, as one tensor each
``replace``   the loop in the place of its steps
"""

from .replace import Rerolled, reroll_loops

__all__ = ["Rerolled", "reroll_loops"]
