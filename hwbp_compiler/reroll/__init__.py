"""Python loops over time, which Dynamo unrolls, rolled up again: find the step that repeats, put one loop in its place.

``values``           what a node stands for: a part of what another one computes
``zeros``            the number that a sum starts from, as a tensor
``find``             where a graph repeats itself
``steps``            what a step takes from outside and from the steps before it; or why it is no loop
``around``           what the rest of the graph takes from the steps, and what it could see change
``totals``           a state that is changed in place, where nobody can see that
``rows``, ``series`` what the steps read, write and give, as one tensor each
``hand_over``        the loop's results, for those who took them from its steps
``loop``             the loop in the place of its steps
``refuse``           which repetitions are worth a loop, and what is told of the others
``replace``          the search
"""

from .replace import Rerolled, reroll_loops

__all__ = ["Rerolled", "reroll_loops"]
