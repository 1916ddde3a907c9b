"""Roll up Python loops over time that Dynamo unrolled: find the step that repeats, and replace its copies by one loop.

``values``           a node as a part of another node's result
``zeros``            the number that a sum starts from, as a tensor
``find``             where a graph repeats itself
``steps``            what a step takes from outside and from earlier steps, or why the steps are no loop
``around``           what the rest of the graph takes from the steps, and which changes it could see
``totals``           a state that is changed in place where nothing can see it
``rows``, ``series`` what the steps read, write and return, as one tensor each
``hand_over``        pass the loop's results to the users of its steps
``loop``             the loop that replaces the steps
``refuse``           which repetitions are worth a loop, and the records of the others
``replace``          the search
"""

from .replace import Rerolled, reroll_loops

__all__ = ["Rerolled", "reroll_loops"]
