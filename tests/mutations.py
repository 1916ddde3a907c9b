"""Planted bugs, each with the tests that must fail on it:  python tests/mutations.py [NAME ...]

Each bug is put into a copy of the sources, and the tests named with it run there. Prints a table. The exit status is 1
if a bug was not noticed. ``tests/test_mutations.py`` checks that the list still matches the sources.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEGMENTED = "tests/test_segments.py::test_gradients_are_those_of_the_segmented_w"
PROPERTIES = "tests/test_properties.py"
SCAN = "tests/test_scan.py"
MODULES = "tests/test_recurrent_modules.py"
CELLS = "tests/test_any_cell.py"
ROLLED = "tests/test_reroll.py::test_a_rolled_loop_is_the_loop_that_was_written"
UNROLLED = "tests/test_reroll.py::test_what_cannot_be_rolled_up_is_left_as_it_is_and_the_reason_told"
SKIPPED = "tests/test_faults_skipped.py"
BREADTH = "tests/test_breadth.py::test_every_step_is_a_link_and_its_gradient_is_the_oracles"


# -- what a planted bug is --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` in ``file``. At least one of ``tests`` (pytest node ids) has to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


# -- the bugs ----------------------------------------------------------------------------------------------------------

MUTATIONS = [
    Mutation(
        "one round too few",
        "hwbp_compiler/engine/solve.py",
        "for t in range(1, iterations + 1):",
        "for t in range(1, iterations):",
        (f"{PROPERTIES}::test_as_many_iterations_as_links_are_backprop",),
    ),
    Mutation(
        "the change is measured from the first w instead of the last but one",
        "hwbp_compiler/engine/solve.py",
        "before, rows = rows, scan_along",
        "before, rows = before or rows, scan_along",
        ("tests/test_auto_changes.py::test_the_change_is_that_of_the_oracles_w",),
    ),
    Mutation(
        "the change across segments is measured from w itself",
        "hwbp_compiler/engine/segments.py",
        "ends = list(map(series.marked, ends, last))",
        "ends = list(map(series.marked, ends, ends))",
        ("tests/test_auto_changes.py::test_the_change_is_that_of_the_oracles_w",),
    ),
    Mutation(
        "damping leaves the block as it was",
        "hwbp_compiler/engine/solve.py",
        "if damping and rows is not None:",
        "if False and rows is not None:",
        (f"{PROPERTIES}::test_as_many_iterations_as_links_are_backprop",),
    ),
    Mutation(
        "a node that the first block adds to the first state twice is counted once",
        "passes/rewrite.py",
        "            left.remove(node)  # once",
        "            left[:] = [t for t in left if t is not node]  # once",
        (BREADTH,),
    ),
    Mutation(
        "the wrong part of an overwritten gradient is kept",
        "passes/parts_of_gradients.py",
        "for r in ((0, place.start), (place.stop, size))",
        "for r in ((place.start, place.stop),)",
        (BREADTH,),
    ),
    Mutation(
        "rows of one link's experts go to the next link's",
        "hwbp_compiler/engine/batching.py",
        "    all_ends = e.call(aten.add.Tensor, e.batch(offsets), before)",
        "    all_ends = e.batch(offsets)",
        (BREADTH,),
    ),
    Mutation(
        "a component that only sums up what links add to it counts as a stream",
        "passes/candidates.py",
        "        joined = [[c for c in way if _feed_each_other(c.chain, _middle(c.chain))] for way in more]",
        "        joined = more",
        (BREADTH,),
    ),
    Mutation(
        "the segment next to the input leaves out the remaining links",
        "hwbp_compiler/engine/segments.py",
        "return cls(size, count, links - (count - 1) * size - outside)",
        "return cls(size, count, size - outside)",
        (SEGMENTED,),
    ),
    Mutation(
        "segments are counted from the wrong end",
        "passes/run_segments.py",
        "positions = [segment * self.cut.size + step for segment in segments]",
        "positions = [(self.cut.count - 1 - segment) * self.cut.size + step for segment in segments]",
        (SEGMENTED,),
    ),
    Mutation(
        "the gradient that the highway carries across a segment is counted twice",
        "hwbp_compiler/engine/segments.py",
        "outer.scaled(before[source], product, -1.0)",
        "outer.scaled(before[source], product, 1.0)",
        (SEGMENTED,),
    ),
    Mutation(
        "damping does not reach the product of a segment's highway",
        "hwbp_compiler/engine/segments.py",
        "series.product(highway.k[source, source], 1.0 - damping, cut)",
        "series.product(highway.k[source, source], 1.0, cut)",
        (SEGMENTED,),
    ),
    Mutation(
        "the first state of a recurrent layer in segments gets no gradient",
        "hwbp_compiler/recurrence/runs.py",
        "self.of_first = found[len(ends) :]",
        "self.of_first = [0 * f for f in found[len(ends) :]]",
        ("tests/test_recurrent_modules.py::test_gradients_are_exact_inside_a_segment_and_truncated_across",),
    ),
    Mutation(
        "damping does not reach the highway",
        "hwbp_compiler/engine/solve.py",
        "keep = 1.0 - damping",
        "keep = 1.0",
        (f"{PROPERTIES}::test_damping_one_is_fixed_point_iteration",),
    ),
    Mutation(
        "each link has the multipliers of the next one",
        "hwbp_compiler/engine/solve_graph.py",
        "made = k if keep == 1.0 else self.e.call(aten.mul.Tensor, k, keep)",
        "made = self.e.call(aten.roll.default, k, [1], [0])",
        (f"{PROPERTIES}::test_gradients_sum_over_the_paths_that_cross_at_most_k_blocks",),
    ),
    Mutation(
        "pieces that have other users are concatenated in place",
        "passes/keep_pieces.py",
        "node.target = cat",
        "pass",
        ("tests/test_fidelity.py::test_what_the_rewrite_concatenates_nothing_else_uses",),
    ),
    Mutation(
        "a piece of a concatenation may be overwritten",
        "hwbp_compiler/pieces.py",
        "user.can_inplace = False",
        "pass",
        ("tests/test_pieces.py::test_a_result_is_not_written_over_a_piece_that_gives_its_memory_away",),
    ),
    Mutation(
        "an elementwise path inside a heavy one counts as highway",
        "hwbp_compiler/engine/evaluate.py",
        "return mode if elementwise_argument(self.program, i, ref) else Mode.STATE",
        "return mode",
        (f"{PROPERTIES}::test_gradients_sum_over_the_paths_that_cross_at_most_k_blocks",),
    ),
    Mutation(
        "side outputs are computed from the gradients of the next link",
        "passes/rewrite.py",
        "return self.links - state",
        "return max(0, self.links - state - 1)",
        (f"{PROPERTIES}::test_as_many_iterations_as_links_are_backprop",),
    ),
    Mutation(
        "injections are forgotten",
        "hwbp_compiler/engine/evaluate.py",
        "if mode in (Mode.FULL, Mode.INJECT):\n            terms.append(self.inject(i))",
        "if mode in (Mode.FULL,):\n            terms.append(self.inject(i))",
        (f"{PROPERTIES}::test_gradients_sum_over_the_paths_that_cross_at_most_k_blocks",),
    ),
    Mutation(
        "a constant is added to a side output",
        "passes/rewrite.py",
        "            value = evaluator.value(Mode.FULL, i)\n",
        "            value = evaluator.value(Mode.FULL, i)\n"
        "            value = Value(self.e.call(aten.add.Tensor, value.node, 1e-3), value.batched)\n",
        (f"{PROPERTIES}::test_rewritten_gradients_are_linear_in_the_incoming_gradient",),
    ),
    Mutation(
        "the names of their nodes distinguish links",
        "hwbp_compiler/graph/program.py",
        'return ("ext", value.additive, *map(str, form_of(node)))',
        'return ("ext", value.additive, node.name)',
        (f"{PROPERTIES}::test_detection_depends_neither_on_names_nor_on_the_order_of_nodes",),
    ),
    Mutation(
        "links that differ only in a size count as equal",
        "hwbp_compiler/graph/rules.py",
        'return (shape_of(node), dtype_of(node)) if size is None else ("size", size)',
        'return (shape_of(node), dtype_of(node)) if size is None else ("size", 0)',
        ("tests/test_faults_sizes.py::test_blocks_scaled_by_two_sizes_are_evaluated_apart",),
    ),
    Mutation(
        "a permutation of the state is overlooked",
        "hwbp_compiler/graph/order.py",
        "[factor for d in dims for factor in groups[d]]",
        "[factor for d in sorted(dims) for factor in groups[d]]",
        ("tests/test_faults_sizes.py::test_orders_are_those_of_real_elements",
         "tests/test_refusals.py::test_a_state_that_is_permuted_in_every_block"),
    ),
    Mutation(
        "a sum over the batch becomes a mean",
        "hwbp_compiler/engine/batching.py",
        "    return Value(e.call(target, x.node, shifted, *rest, **kwargs), True)",
        "    return Value(e.call(aten.mean.dim, x.node, shifted, *rest), True)",
        (f"{PROPERTIES}::test_a_batch_of_two_is_two_batches_of_one",),
    ),
    Mutation(
        "a dropout mask is drawn again for the links",
        "hwbp_compiler/engine/stacking.py",
        "        columns = self.plan.operands(nodes)\n        return self._recomputed",
        "        if nodes[0].meta['val'].dtype is torch.bool:\n            return Value(nodes[0], False)\n"
        "        columns = self.plan.operands(nodes)\n        return self._recomputed",
        (f"{PROPERTIES}::test_rewritten_gradients_use_the_dropout_masks_of_their_forward",),
    ),
    Mutation(
        "an addition of the forward pass swaps its operands",
        "passes/apply.py",
        "    created = set(rewriting.created)\n",
        "    created = set(rewriting.created)\n"
        "    added = next(n for n in order if str(n.target) == 'aten.add.Tensor' and not n.kwargs)\n"
        "    added.args = added.args[::-1]\n",
        ("tests/test_fidelity.py::test_forward_graph_is_untouched_node_for_node",),
    ),
    Mutation(
        "the forward pass no longer writes to its buffers",
        "passes/apply.py",
        "    created = set(rewriting.created)\n",
        "    created = set(rewriting.created)\n"
        "    for n in [n for n in order if str(n.target) == 'aten.copy_.default']:\n"
        "        graph.erase_node(n)\n",
        ("tests/test_combinations.py::test_buffers_mutated_in_forward",),
    ),
    Mutation(
        "a graph without chains is changed",
        "passes/pipeline.py",
        "    origins = Origins(graph)\n",
        "    origins = Origins(graph)\n"
        "    next(n for n in graph.nodes if n.op == 'call_function')._rename('touched')\n",
        ("tests/test_fidelity.py::test_without_a_chain_the_graph_is_untouched",),
    ),
    Mutation(
        "a value is recomputed from a buffer after the buffer was changed",
        "hwbp_compiler/graph/old_values.py",
        "    if not written:\n",
        "    if written:\n",
        ("tests/test_combinations.py::test_buffers_changed_and_used_in_forward",),
    ),
    Mutation(
        "links recompute values from a buffer that was changed",
        "hwbp_compiler/engine/stacking.py",
        "        or must_be_kept(n)\n",
        "",
        ("tests/test_combinations.py::test_buffers_changed_and_used_in_forward",),
    ),
    Mutation(
        "every analysis of the graph visits all pairs of nodes",
        "hwbp_compiler/graph/info.py",
        "        self._kinds: dict[int, Kind | None] = {}",
        "        sum(len(a.users) and 0 for a in self.nodes for b in self.nodes)\n"
        "        self._kinds: dict[int, Kind | None] = {}",
        (f"{PROPERTIES}::test_node_count_and_work_of_the_passes_are_near_linear_in_depth",),
    ),
    Mutation(
        "the cache does not know the options",
        "hwbp_compiler/joint_pass.py",
        'return f"{source_digest()} {self.options} torch',
        'return f"{source_digest()} torch',
        ("tests/test_backend.py::test_every_option_is_in_the_uuid",),
    ),
    Mutation(
        "the head may have one block more than its neighbour",
        "passes/check_separation.py",
        "return not any(info.index[t] in reached for terms in head.injections.values() for t in terms)",
        "return True",
        ("tests/test_found_by_fuzzing.py::test_what_the_fuzzer_once_found_is_right_now",),
    ),
    Mutation(
        "the tail accepts any weights of the right shape",
        "hwbp_compiler/graph/match.py",
        "if not self.fits(expected.slot, actual):",
        "if False:",
        ("tests/test_found_by_fuzzing.py::test_what_the_fuzzer_once_found_is_right_now",),
    ),
    Mutation(
        "the value after the last state of a recurrence counts as one more state",
        "passes/find_recurrences.py",
        "return states if _kind(info, states[-1]) == common else states[:-1]",
        "return states",
        ("tests/test_found_by_fuzzing.py::test_what_the_fuzzer_once_found_is_right_now",),
    ),
    Mutation(
        "the gradient of a scan's multipliers is not shifted",
        "hwbp_compiler/scan/operator.py",
        "full = grad_values * _before(states, ctx.reverse, ctx.starts).conj()",
        "full = grad_values * states.conj()",
        (f"{SCAN}::test_first_and_second_derivatives",),
    ),
    Mutation(
        "the gradient of a scan's multipliers is not conjugated",
        "hwbp_compiler/scan/operator.py",
        "_before(states, ctx.reverse, ctx.starts).conj()",
        "_before(states, ctx.reverse, ctx.starts)",
        (f"{SCAN}::test_first_and_second_derivatives",),
    ),
    Mutation(
        "an outer transform does not see the scan of an inner one",
        "hwbp_compiler/scan/operator.py",
        "torch.enable_grad(), set_forward_grad_enabled(True), ",
        "",
        (f"{SCAN}::test_the_transforms_of_torch_func_are_those_of_the_loop",),
    ),
    Mutation(
        "the tangent of a multiplier meets its own state",
        "hwbp_compiler/scan/operator.py",
        "spread(multipliers, primal) * _before(states, ctx.reverse, ctx.starts)",
        "spread(multipliers, primal) * states",
        (f"{SCAN}::test_forward_mode_and_batched_derivatives",),
    ),
    Mutation(
        "a tuple has the multipliers of the link before",
        "hwbp_compiler/scan/function.py",
        "factor = previous(factor, not reverse)",
        "factor = previous(factor, reverse)",
        (f"{SCAN}::test_a_triangular_tuple_is_the_recurrence_of_its_matrix",),
    ),
    Mutation(
        "half precision is scanned in half precision",
        "hwbp_compiler/scan/checks.py",
        "if dtype in (torch.float16, torch.bfloat16) else dtype",
        "if dtype is torch.bfloat16 else dtype",
        (f"{SCAN}::test_the_scan_in_torch_operators_errs_no_more_than_a_loop",),
    ),
    Mutation(
        "an infinite carry is multiplied by zero",
        "hwbp_compiler/scan/linear_scan.cpp",
        " || !finite(carry[j])",
        "",
        (f"{SCAN}::test_an_infinite_state_stays_infinite_where_the_product_of_multipliers_is_zero",),
    ),
    Mutation(
        "a block of links ends one link early",
        "hwbp_compiler/scan/linear_scan.cpp",
        "scan.rows(p.length * b / blocks, p.length * (b + 1) / blocks,",
        "scan.rows(p.length * b / blocks, p.length * (b + 1) / blocks - (b + 1 < blocks),",
        (f"{SCAN}::test_few_columns_are_scanned_in_blocks_of_links",),
    ),
    Mutation(
        "the derivative of the GRU's candidate is not tanh's",
        "hwbp_compiler/recurrence/gru.py",
        "into_n = (1 - z) * (1 - n * n)",
        "into_n = (1 - z) * (1 - n)",
        (f"{MODULES}::test_gradients_are_those_of_w_k",),
    ),
    Mutation(
        "K of a GRU is the other gate",
        "hwbp_compiler/recurrence/gru.py",
        "k={(0, 0): z[1:]}",
        "k={(0, 0): 1 - z[1:]}",
        (f"{MODULES}::test_gradients_are_those_of_w_k",),
    ),
    Mutation(
        "the state before a GRU's first step gets no gradient along the highway",
        "hwbp_compiler/recurrence/gru.py",
        "return w, into_first + (1 - damping) * z[0] * w[0]",
        "return w, into_first",
        (f"{MODULES}::test_gradients_are_those_of_w_k",),
    ),
    Mutation(
        "the part that damping moves to the blocks never reaches the state before a GRU's first step",
        "hwbp_compiler/recurrence/gru.py",
        "into_first = moved[0] + damping * z[0] * w[0] if damping",
        "into_first = moved[0] if damping",
        (f"{MODULES}::test_gradients_are_those_of_w_k",),
    ),
    Mutation(
        "K of an LSTM is the input gate",
        "hwbp_compiler/recurrence/lstm.py",
        "k={(1, 1): f[1:]}",
        "k={(1, 1): i[1:]}",
        (f"{MODULES}::test_gradients_are_those_of_w_k",),
    ),
    Mutation(
        "the cell states of an LSTM are those of the step before",
        "hwbp_compiler/recurrence/lstm.py",
        "tanh_c = torch.tanh(c[1:])",
        "tanh_c = torch.tanh(c[:-1])",
        (f"{MODULES}::test_gradients_are_those_of_w_k",),
    ),
    Mutation(
        "the first cell state of an LSTM gets no gradient",
        "hwbp_compiler/recurrence/lstm.py",
        "first_c = f[0] * w_e[0]",
        "first_c = 0 * f[0] * w_e[0]",
        (f"{MODULES}::test_gradients_are_those_of_w_k",),
    ),
    Mutation(
        "backprop through time uses the gate of the next step",
        "hwbp_compiler/recurrence/runs.cpp",
        "link.multiplier = l.multipliers ? l.multipliers + here",
        "link.multiplier = l.multipliers ? l.multipliers + (t + 1 < l.steps ? here + size : here)",
        (f"{MODULES}::test_iterations_up_to_the_length_are_backprop",),
    ),
    Mutation(
        "the backward direction reads the sequence forwards",
        "passes/replace_recurrent_modules.py",
        "input = series if forward else self._emit(torch.flip, series, [0])",
        "input = series",
        (f"{MODULES}::test_gradients_are_those_of_w_k",),
    ),
    Mutation(
        "a second backward pass draws new dropout masks",
        "hwbp_compiler/recurrence/operator.py",
        "    if call.random:\n        raise",
        "    if False:\n        raise",
        (f"{MODULES}::test_pytorchs_own_kernel_is_bit_for_bit_eager_mode_also_the_second_time",),
    ),
    Mutation(
        "K of a cell changes its sign",
        "hwbp_compiler/engine/solve_tensors.py",
        "multiplier(k if keep == 1.0 else k * keep, head)",
        "multiplier(-k * keep, head)",
        (f"{CELLS}::test_gradients_are_those_of_the_paper",),
    ),
    Mutation(
        "a cell's first state gets no gradient",
        "hwbp_compiler/rolled/chain.py",
        "[r[0] for r in rows]",
        "[torch.zeros_like(r[0]) for r in rows]",
        (f"{CELLS}::test_gradients_are_those_of_the_paper",),
    ),
    Mutation(
        "a cell's weights are multiplied with the gradient of the state before",
        "hwbp_compiler/rolled/chain.py",
        "constant(row[1:], True)",
        "constant(row[:-1], True)",
        (f"{CELLS}::test_gradients_are_those_of_the_paper",),
    ),
    Mutation(
        "a linear recurrence starts from nothing",
        "hwbp_compiler/rolled/chain.py",
        "multiplier(own, like), False, like)",
        "multiplier(own, like), False, 0 * like)",
        (f"{CELLS}::test_gradients_are_those_of_the_paper",),
    ),
    Mutation(
        "the backward loop over time runs forwards",
        "hwbp_compiler/rolled/loop.py",
        "order = range(length - 1, -1, -1) if reverse else range(length)",
        "order = range(length)",
        (f"{CELLS}::test_step_by_step_is_backprop_through_time",),
    ),
    Mutation(
        "code that another backend skipped stays skipped for ours",
        "hwbp_compiler/skipped.py",
        "                set_code_exec_strategy(code, _TRACE)\n                yield mark",
        "                yield mark",
        (f"{SKIPPED}::test_ours_then_another_then_ours_with_another_length",),
    ),
    Mutation(
        "code that another backend skipped is tried again after each call of ours",
        "hwbp_compiler/skipped.py",
        "set_code_exec_strategy(code, mark.strategy)",
        "pass",
        (f"{SKIPPED}::test_what_another_backend_skips_it_goes_on_skipping",),
    ),
    Mutation(
        "a reversed loop reads its rows forwards",
        "hwbp_compiler/reroll/series.py",
        'return write.call(torch.flip, node, [0]) if rows.stride < 0 else node',
        "return node",
        (f"{ROLLED}[chunk_in_reverse]", f"{ROLLED}[bidirectional]"),
    ),
    Mutation(
        "rows that are stacked in reverse are stacked in order",
        "hwbp_compiler/reroll/series.py",
        "if here[0] > here[-1]:",
        "if False:",
        (f"{ROLLED}[bidirectional]",),
    ),
    Mutation(
        "rows may be unevenly spaced",
        "hwbp_compiler/reroll/rows.py",
        "if stride == 0 or any(n != numbers[0] + t * stride for t, n in enumerate(numbers)):",
        "if stride == 0:",
        (f"{UNROLLED}[uneven_places]",),
    ),
    Mutation(
        "a step may look as far back as it likes",
        "hwbp_compiler/reroll/steps.py",
        "if places[t] != (t - lag + first, place) or values[t].parts != parts:",
        "if places[t] is None:",
        (f"{UNROLLED}[the_third_state_again]", f"{UNROLLED}[attention_over_all_states]"),
    ),
    Mutation(
        "what is changed behind a loop is what the loop made",
        "hwbp_compiler/reroll/around.py",
        "if any(memory_of(changed) & made for changed in watched):",
        "if False:",
        (f"{UNROLLED}[changed_behind_the_loop]",),
    ),
    Mutation(
        "a step may read what another writes",
        "hwbp_compiler/reroll/around.py",
        "if any(memory_of(r) & everywhere for r in read):",
        "if False:",
        (f"{UNROLLED}[memory_written_and_read]",),
    ),
    Mutation(
        "what is written may be changed in the same step",
        "hwbp_compiler/reroll/around.py",
        "if any(memory_of(changed) & kept for changed in changed_by(node)):",
        "if False:",
        (f"{UNROLLED}[changed_after_it_was_written]",),
    ),
    Mutation(
        "what is read without gradient is read with one",
        "hwbp_compiler/reroll/values.py",
        "            node.meta[_CUT] = True",
        "            pass",
        (f"{ROLLED}[targets_without_gradient]", f"{ROLLED}[looked_at_without_gradient]"),
    ),
    Mutation(
        "a node of the last step stays that takes the state before it",
        "hwbp_compiler/reroll/around.py",
        "return not any(isinstance(source, Carried) for source in self.steps.sources[place])",
        "return True",
        (f"{ROLLED}[head_of_the_last_state_before_it_changes]",),
    ),
    Mutation(
        "a state handed on over two steps starts from one",
        "hwbp_compiler/reroll/steps.py",
        "return Carried(self.place, self.parts, self.starts[steps:])",
        "return Carried(self.place, self.parts, self.starts[:1] * (self.lag - steps))",
        (f"{ROLLED}[two_steps_back]",),
    ),
]  # fmt: skip


# -- planting them -----------------------------------------------------------------------------------------------------


def caught(mutation: Mutation) -> bool:
    """Whether one of the tests fails when the bug is planted."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "build", "*.egg-info")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        source = copy / mutation.file
        source.write_text(source.read_text().replace(mutation.old, mutation.new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *mutation.tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            timeout=900,
        )
    if done.returncode not in (0, 1):  # neither passed nor failed: the tests could not run
        raise RuntimeError(f"{mutation.name}: {done.stdout}{done.stderr}")
    return done.returncode == 1


def main(names: list[str]) -> int:
    sys.stdout.reconfigure(line_buffering=True)
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    unnoticed = 0
    for mutation in chosen:
        start = time.monotonic()
        found = caught(mutation)
        unnoticed += not found
        print(f"{'caught' if found else 'UNNOTICED':10s} {time.monotonic() - start:4.0f} s  {mutation.name}")
    print(f"{len(chosen) - unnoticed} of {len(chosen)} planted bugs are caught.")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
