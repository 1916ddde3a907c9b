"""Why a chain is rewritten or left exact: each reason a member of :class:`Reason`, with its text and advice.

Whoever decides by a reason compares members; texts are for users who know PyTorch and not this compiler, may be
reworded at any time, and name no node of a graph.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

_TO_RECURRENT = "Give the step to hwbp_compiler.recurrent(cell, inputs, state)"
_ONE_LAYOUT = "Keep the residual stream in one layout: transpose inside the block, and back before the addition."
_RULE = "a rule for an operator is one line in hwbp_compiler/graph/rules.py."
_OTHERWISE = "Write that part of the block with other operators, or report it: report.save_repro(path) writes a script."
_DEFECT = "A defect of ours: report.save_repro(path) writes a script for a report."


class Reason(enum.Enum):
    """Names never change their meaning. ``text`` and ``advice`` are templates; :meth:`of` fills them in."""

    # -- decided by the options ------------------------------------------------------------------------------------
    REWRITTEN_ALWAYS = 'rewrite="always"; estimated {estimate}'
    EXPECTED_FASTER = "expected to be faster: {estimate}"
    LINEAR_RECURRENCE = "a linear recurrence, its gates see the input alone: a scan in both directions, exact at k = 0"
    NOT_EXPECTED_FASTER = (
        "not expected to be faster: {estimate}",
        'rewrite="always" rewrites it all the same; fewer iterations or a smaller batch may pay.',
    )
    TO_BE_CHOSEN = (
        '"auto" chooses among {count} forms while the model trains, by comparing gradients; until then it is exact. '
        "The fastest of them, {estimate}"
    )
    NEEDS_MEMORY = (
        "needs {needed:.3g} MB more at a time than exact backprop; max_extra_memory={given!r} allows {limit:.3g} MB",
        "A larger max_extra_memory, a smaller batch, or a shorter model.",
    )
    SHOWN_OF_AUTO = (
        '"auto" chooses among {forms} while the model trains, by comparing with the exact gradient. Here it is shown '
        "as the first of them, {estimate}"
    )
    NO_CANDIDATE = (
        '"auto" keeps it exact: no k and S are expected to be faster',
        'rewrite="always" tries some all the same; a larger model, or a longer one, may pay.',
    )
    TOO_SHORT = "shorter than min_length={min_length}", "{advice}"
    EXACT_ASKED_FOR = 'iterations="exact" asks for ordinary backprop', "{advice}"
    ITERATIONS_REACH_LENGTH = (
        "iterations={iterations} reaches the chain's length {length}: that is ordinary backprop",
        "{advice}",
    )
    ITERATIONS_REACH_SEGMENTS = (
        "iterations={iterations} are ordinary backprop of a chain of {length} links in {segments} segments "
        "(segment={segment})",
        "{advice}",
    )
    REWRITE_NEVER = (
        'rewrite="never" asks for ordinary backprop',
        'rewrite="profitable", the default, or "always".',
    )

    # -- no state separates one link from the next -----------------------------------------------------------------
    CONNECTION_SKIPS_STEPS = (
        "a connection skips steps: what an earlier block computed enters a later one directly",
        "Add what later blocks need to the residual stream, or carry it along as part of the state.",
    )
    NOTHING_FROM_STEP_BEFORE = "a step takes nothing from the step before it"
    STATE_TOO_WIDE = (
        "{width} tensors pass from each step to the next; a state of more than {widest} is not handled",
        f"{_TO_RECURRENT} if it is a loop over time: it takes a state of any number of tensors. Elsewhere carry at "
        "most {widest} tensors from step to step.",
    )
    GRADIENT_IN_TOO_MANY_TERMS = (
        "the gradient of a step's state is the sum of {parts} terms that no {widest} tensors of the graph stand for",
        f"{_TO_RECURRENT}, which knows what the state is.",
    )
    STATE_CHANGES_WIDTH = (
        "{before} tensors pass into a step and {after} out of it",
        "Carry the same tensors from every step to the next, in the same order.",
    )
    STATE_CHANGES_SHAPE = (
        "the residual stream changes its shape from {before} to {after}",
        "Such a step is left exact; the blocks of one shape on either side form chains of their own.",
    )
    STATE_CHANGES_DTYPE = (
        "the residual stream changes its dtype from {before} to {after}",
        "Keep the residual stream in one dtype; autocast inside the blocks does no harm.",
    )
    CELL_CHANGES_STATE = "the state changes its shape or dtype"
    COMPONENT_WITHOUT_GRADIENT = "a component of the state gets no gradient from the state after it"
    RESULTS_COME_BACK = (
        "what a step gives to the rest of the model comes back into a later step (attention over all earlier states, "
        "for example)",
        "Later steps may see earlier ones through the state alone.",
    )
    VALUE_USED_ELSEWHERE = (
        "the backward pass uses a value inside a block for something else as well, and how is not understood",
        "Keep connections that skip over several blocks, as in a U-Net, out of this stretch. If it has none: "
        "report.save_repro(path) writes a script for a report.",
    )

    # -- no elementwise path, or none that is a triangle of diagonals ----------------------------------------------
    NO_ELEMENTWISE_PATH = (
        "the state has no elementwise path from one step to the next: K = 0",
        "Nothing: its gradients are exact. A gate that leads the state past the matrix (GRU, LSTM) would make one.",
    )
    MODULE_WITHOUT_PATH = (
        "no elementwise path: a step of a {module} sees the state before it through a matrix alone (K = 0)",
        "Nothing: its gradients are exact. nn.GRU and nn.LSTM lead their state past the matrix by a gate.",
    )
    STATE_MEETS_ITSELF_PERMUTED = "the state meets itself with its elements in another order", _ONE_LAYOUT
    STATE_RETURNED_PERMUTED = (
        "a block returns its state with the elements in another order than it was given",
        _ONE_LAYOUT,
    )
    ORDER_UNKNOWN = (
        "a block moves the elements of its state about and views them in a shape that cuts across, and the order "
        "cannot be followed through that",
        _ONE_LAYOUT,
    )
    STATE_IN_A_CIRCLE = (
        "the tensors of the state feed one another element by element in a circle (position and velocity of an "
        "oscillator, or a complex multiplication written with real parts, for example)",
        "Let each tensor of the state carry on itself and those after it only.",
    )
    SHORTCUT_HAS_LAYER = (
        "the shortcut of this block {what}: no element of the state leads straight to one of the next",
        "Nothing, if it is a strided or widening block: it is left exact, and the blocks on either side are chains "
        "of their own.",
    )
    FEATURES_CONCATENATED = (
        "features are concatenated (torch.cat, as in a DenseNet), not added: the state grows from block to block, so "
        "no element of it leads straight to one of the next",
        "Only x + f(x) and gates make a highway; a block that adds to a state of fixed width would.",
    )
    INTERRUPTED = (
        "between one block and the next the state itself goes through {operator}, which moves or mixes its elements: "
        "no element of it leads straight to one behind the next block",
        "Move it inside the blocks, or before the first and behind the last of them.",
    )
    WIDE_ELEMENTWISE_RECURRENCE = (
        "a recurrence that is elementwise altogether and carries several tensors from step to step: without blocks "
        "only a state of one tensor is recognised",
        f"{_TO_RECURRENT}, which takes such a state apart.",
    )

    # -- operators -------------------------------------------------------------------------------------------------
    NOT_LINEAR_IN_GRADIENT = (
        "the gradient goes into {operator} in a place where the result is not linear in it",
        "Backward formulas that use the incoming gradient in such a way cannot be iterated; a custom "
        "autograd.Function or a hook on a tensor is the usual cause.",
    )
    ADDS_CONSTANT = (
        "a block's backward adds the constant {constant} to the gradient",
        "A custom autograd.Function is the usual cause: let its backward be linear in what it is given.",
    )
    COMPLEX = (
        "{what}: the compiler has no rule for this operator",
        f"{_TO_RECURRENT} if it is a loop over time: there states may be complex. Elsewhere write it with the "
        "real and the imaginary part.",
    )
    NO_RULE_ON_TRUNK = (
        "the state passes through {operator} on its way past the blocks, an operator that the compiler has no rule "
        "for: it cannot tell whether an element leads straight to one of the next state",
        f"Use other operators of PyTorch's there, or move it into the blocks; {_RULE}",
    )
    NO_RULE_IN_BLOCK = (
        "a block uses {operator}, an operator that the compiler has no rule for, so it cannot tell how a gradient "
        "passes through it",
        f"Write that part with other operators of PyTorch's, or keep it outside the residual blocks; {_RULE}",
    )
    SIZE_NOT_AT_HAND = (
        "the size {size}, known only at run time (dynamic shapes), is not at hand in the backward pass",
        _OTHERWISE,
    )
    SIZE_NOT_GIVEN = "the size {size} is not a size of anything that the step is given", _OTHERWISE
    NOT_FOR_SEVERAL_BLOCKS = "{operator} cannot be evaluated for several blocks at once", _OTHERWISE
    CONSTANT_INSIDE = (
        "a block makes a constant tensor inside, which cannot be evaluated for several blocks at once",
        _OTHERWISE,
    )
    NO_BATCHING_RULE = "operator {operator} has no batching rule ({error})", _OTHERWISE
    TENSOR_BY_KEYWORD = "operator {operator} takes a tensor by keyword", _OTHERWISE
    DROPOUT_IN_ATTENTION = (
        "attention with dropout has no batching rule: its mask depends on the place in the batch",
        _OTHERWISE,
    )
    MASK_IN_ATTENTION = "{operator} with a mask has no batching rule: the mask's alignment would be lost", _OTHERWISE

    # -- recurrent modules -----------------------------------------------------------------------------------------
    PACKED_SEQUENCE = (
        "a packed sequence: its steps have batches of different sizes. PyTorch's own kernel is used",
        "A padded batch in place of the packed one.",
    )
    PACKED_BREAKS_GRAPH = (
        "a packed sequence: Dynamo breaks the graph at it, and the module runs in eager mode, with exact gradients"
    )
    PROJECTIONS = (
        "an LSTM with projections (proj_size). PyTorch's own kernel is used",
        "No proj_size, and a smaller hidden_size or a linear layer behind the LSTM instead.",
    )
    MODULE_UNDER_AUTOCAST = (
        "under autocast PyTorch's own kernel is used",
        "Call it inside torch.autocast(device_type, enabled=False), or give the model and its inputs the lower "
        "precision themselves.",
    )
    CALLED_STEP_BY_STEP = (
        "called step by step in a loop: every call is a chain of its own, of one link",
        "One call for the whole sequence, nn.GRUCell or nn.LSTMCell in the loop, or "
        "hwbp_compiler.recurrent(cell, inputs, state) in its place.",
    )

    # -- loops -----------------------------------------------------------------------------------------------------
    HIGHER_ORDER_LOOP = (
        "a loop written with torch's {name} may have any length: its steps are inside one operator, not in the graph",
        "hwbp_compiler.recurrent, nn.GRU, nn.LSTM, or a Python loop over a fixed number of steps.",
    )
    CELL_HOLDS_TENSOR = (
        "the cell holds a tensor that is no parameter, buffer or captured variable",
        "Make the tensor outside the cell, or register it as a buffer.",
    )
    CELL_CONTAINS_MODULE = (
        "the cell contains a recurrent module ({module}), which runs over a time of its own",
        "nn.GRUCell, nn.LSTMCell or nn.RNNCell for one step a call; run the module before or after the loop where it "
        "does not need the state.",
    )
    CELL_DRAWS_RANDOM_NUMBERS = (
        "the cell draws random numbers ({operator}); computed again they would differ",
        "Draw them for all steps before the loop and hand them in as an input.",
    )
    CELL_RUNS_LOOP = (
        "the cell runs a loop of its own",
        "Make the inner loop's steps part of the outer cell, or run the inner loop for all steps at once.",
    )
    CELL_CONTAINS_HIGHER_ORDER = (
        "the cell contains {operator}, which has its own way to differentiate",
        "Write that part with PyTorch's operators, or move it out of the cell.",
    )
    CELL_SWITCHES_GRADIENTS = (
        "the cell switches gradients on or off inside",
        "Use x.detach() where no gradient is to pass, or compute that part before the loop.",
    )
    CELL_WRITES_IN_PLACE = "the cell writes in place ({operator})", "Write the change as a new tensor."
    CELL_HAS_EFFECTS = (
        "the cell calls {operator} for its effect alone, once a step",
        "Check or report it outside of the loop.",
    )
    CELL_UNTRACEABLE = "{error}", "Write the cell with operators that torch.compile can trace."

    # -- Python loops, where they stay unrolled --------------------------------------------------------------------
    SHAPES_DEPEND_ON_STEP = (
        "a tensor has another shape in every step, {before} and then {after} (in {operator})",
        "Keep shapes the same: write into a tensor made before the loop, and mask what is not there yet.",
    )
    CONSTANT_DEPENDS_ON_STEP = (
        "a constant of {operator} is {before} in one step and {after} in the next",
        "Put such numbers into a tensor before the loop, and take numbers[t] in step t.",
    )
    STEP_LOOKS_FURTHER = (
        "in {operator} a step takes what another step computed than the one before it, or not always the same",
        "Hand it on from step to step, as part of the state.",
    )
    STEPS_TAKE_OTHER_THINGS = (
        "{operator} takes something in every step that is no tensor",
        "Give the steps tensors and numbers only.",
    )
    NO_TENSOR_FROM_STEP = (
        "a step gives something to the next, or to the rest of the model, that is no tensor",
        "Let steps hand on tensors only.",
    )
    STEP_CHANGES_IN_PLACE = (
        "a step changes a tensor in place that it did not make",
        "Write the change as a new tensor: h = h * z, not h.mul_(z). (out[t] = y is allowed where no step reads out.)",
    )
    STEP_WRITES_OUTSIDE = (
        "a step writes into a tensor made before the loop, at a place that does not move evenly",
        "Append to a list and stack it behind the loop.",
    )
    WRITTEN_IS_READ = (
        "the steps read a tensor that they write into, or write into it in two places",
        "Carry what later steps need in a variable of its own.",
    )
    CHANGED_AFTER_WRITE = (
        "a step changes a value in place after writing it into a tensor made before the loop",
        "Write a clone, or make the change a new tensor.",
    )
    CHANGED_AFTER_LOOP = (
        "{operator} changes in place what a step computed, or watches its gradient",
        "Write the change as a new tensor, or clone the tensor first.",
    )

    # -- stages of a pipeline --------------------------------------------------------------------------------------
    STAGE_TAKES_MORE = (
        "the stage takes {taken} and gives {given} that want a gradient; a highway leads from one to one",
        "Hand one tensor from stage to stage, and masks or positions as ones that want no gradient.",
    )
    STAGE_CHANGES_STATE = (
        "the stage takes {before} and gives {after}: no element leads straight to one",
        "Cut the model so that such a step lies in a stage of its own or at the end of one.",
    )
    STAGE_GIVES_NO_GRADIENT = "what the stage takes wants no gradient: nothing lies before it that trains"
    STAGE_UNTRACEABLE = (
        "the stage cannot be traced ({error})",
        "Write it so that torch.export could trace it: no branch on a tensor's value.",
    )
    STAGE_DRAWS_UNSEEN = (
        "K depends on what the stage computes, which draws random numbers in compiled code: they cannot be drawn again",
        "Compile the blocks of the stage that draw none, or leave the stage to eager mode.",
    )
    STAGE_OVERWRITES = (
        "K depends on {buffer}, which the stage overwrites",
        "Keep what multiplies the residual stream out of buffers that change.",
    )
    STAGE_IS_SHARDED = (
        "K depends on parameters that are sharded (FSDP2), and is computed from whole ones",
        "DistributedDataParallel, or a model whose K is 1 (pre-LN).",
    )

    # -- defects ---------------------------------------------------------------------------------------------------
    DEFECT = "{error}", _DEFECT
    NOT_COMPILED = "the rewritten graph could not be compiled", _DEFECT
    DEFECT_IN_LOOP = "{error}", "A defect of ours: please report it, with the cell."

    def __init__(self, text: str, advice: str = "") -> None:
        self.text, self.advice = text, advice

    def of(self, **values: Any) -> Why:
        """The reason with its text and advice filled in."""
        return Why(self, self.text.format(**values), self.advice.format(**values))


@dataclass(frozen=True)
class Why:
    """A reason in one case: its ``code``, and ``text`` and ``advice`` as a user reads them."""

    code: Reason
    text: str
    advice: str = ""

    def after(self, words: str) -> Why:
        """The same with ``words`` before its text."""
        return Why(self.code, f"{words}{self.text}", self.advice)


class Declined(Exception):
    """What cannot be rewritten soundly, and :attr:`why`. It is left exact."""

    def __init__(self, why: Why | Reason) -> None:
        self.why = why.of() if isinstance(why, Reason) else why
        super().__init__(self.why.text)
