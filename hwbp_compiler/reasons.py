"""Why a chain is rewritten or left exact: each reason is a member of :class:`Reason`, with a text and advice.

Code compares members, never texts. The texts are for users who know PyTorch but not this compiler. They may be reworded
at any time. They never contain the name of a graph node.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

_TO_RECURRENT = "Give the step to hwbp_compiler.recurrent(cell, inputs, state)"
_ONE_LAYOUT = "Keep the residual stream in one layout: transpose inside the block, and back before the addition."
_RULE = "a rule for an operator is one line in hwbp_compiler/graph/rules.py."
_OTHERWISE = "Write that part of the block with other operators, or report it: report.save_repro(path) writes a script."
_DEFECT = "This is a bug in hwbp_compiler. Please report it: report.save_repro(path) writes a script."


class Reason(enum.Enum):
    """Why a chain is rewritten or left exact. The name of a member never changes its meaning.

    ``text`` and ``advice`` are templates; :meth:`of` fills them in.
    """

    # -- decided by the options ------------------------------------------------------------------------------------
    REWRITTEN_ALWAYS = 'rewrite="always"; estimated {estimate}'
    EXPECTED_FASTER = "expected to be faster: {estimate}"
    LINEAR_RECURRENCE = "a linear recurrence, its gates see only the input: a scan in both directions, exact at k = 0"
    NOT_EXPECTED_FASTER = (
        "not expected to be faster: {estimate}",
        'rewrite="always" rewrites it anyway; it may pay with fewer iterations or a smaller batch.',
    )
    TO_BE_CHOSEN = (
        '"auto" chooses among {count} forms while the model trains, by comparing gradients; until then it is exact. '
        "The fastest of them, {estimate}"
    )
    NEEDS_MEMORY = (
        "needs {needed:.3g} MB more at a time than exact backprop; max_extra_memory={given!r} allows {limit:.3g} MB",
        "Raise max_extra_memory, or use a smaller batch or a shorter model.",
    )
    SHOWN_OF_AUTO = (
        '"auto" chooses among {forms} while the model trains, by comparing with the exact gradient. Here it is shown '
        "as the first of them, {estimate}"
    )
    NO_CANDIDATE = (
        '"auto" keeps it exact: no k and S are expected to be faster',
        'rewrite="always" tries some anyway; it may pay for a larger or longer model.',
    )
    TOO_SHORT = "shorter than min_length={min_length}", "{advice}"
    EXACT_ASKED_FOR = 'iterations="exact" asks for ordinary backprop', "{advice}"
    ITERATIONS_REACH_LENGTH = (
        "iterations={iterations} reaches the chain's length {length}: that is ordinary backprop",
        "{advice}",
    )
    ITERATIONS_REACH_SEGMENTS = (
        "iterations={iterations} is ordinary backprop for a chain of {length} links in {segments} segments "
        "(segment={segment})",
        "{advice}",
    )
    REWRITE_NEVER = (
        'rewrite="never" asks for ordinary backprop',
        'Use rewrite="profitable", the default, or "always".',
    )

    # -- no state separates one link from the next -----------------------------------------------------------------
    CONNECTION_SKIPS_STEPS = (
        "a connection skips steps: a result of an earlier block enters a later one directly",
        "Add what later blocks need to the residual stream, or carry it along as part of the state.",
    )
    NOTHING_FROM_STEP_BEFORE = "a step takes nothing from the step before it"
    STATE_TOO_WIDE = (
        "{width} tensors pass from each step to the next; a state of more than {widest} is not handled",
        f"{_TO_RECURRENT} if it is a loop over time: it accepts a state of any number of tensors. Otherwise carry "
        "at most {widest} tensors from step to step.",
    )
    GRADIENT_IN_TOO_MANY_TERMS = (
        "the gradient of a step's state is a sum of {parts} terms; the compiler needs it in at most {widest} tensors",
        f"{_TO_RECURRENT}, which is given the state explicitly.",
    )
    STATE_CHANGES_WIDTH = (
        "{before} tensors pass into a step and {after} out of it",
        "Carry the same tensors from every step to the next, in the same order.",
    )
    STATE_CHANGES_SHAPE = (
        "the residual stream changes its shape from {before} to {after}",
        "Nothing to do: this step stays exact, and the blocks before and after it form separate chains.",
    )
    STATE_CHANGES_DTYPE = (
        "the residual stream changes its dtype from {before} to {after}",
        "Keep the residual stream in one dtype; autocast inside the blocks is fine.",
    )
    CELL_CHANGES_STATE = "the state changes its shape or dtype"
    COMPONENT_WITHOUT_GRADIENT = "a component of the state gets no gradient from the state after it"
    RESULTS_COME_BACK = (
        "a step's result reaches a later step by a way around the state (attention over all earlier states, for "
        "example)",
        "Let later steps see earlier ones only through the state.",
    )
    VALUE_USED_ELSEWHERE = (
        "the backward pass also uses a value inside a block for something else, and the compiler does not recognise "
        "how",
        "Keep connections that skip over several blocks, as in a U-Net, out of this stretch. If it has none: "
        "report.save_repro(path) writes a script for a report.",
    )
    CUT_OFF = (
        "two streams feed each other, and the chain of the other one is rewritten as a whole: the gradient of a block "
        "here leads through that chain, so the stretch is cut at this place",
        "Nothing to do: what is cut off stays exact, and the links before and after it form chains of their own.",
    )

    # -- no elementwise path, or K is not triangular with diagonal entries -------------------------------------------
    NO_ELEMENTWISE_PATH = (
        "the state has no elementwise path from one step to the next: K = 0",
        "Nothing to do: its gradients are exact. A gate that carries the state past the matrix (GRU, LSTM) would give "
        "such a path.",
    )
    MODULE_WITHOUT_PATH = (
        "no elementwise path: a step of a {module} sees the previous state only through a matrix (K = 0)",
        "Nothing to do: its gradients are exact. nn.GRU and nn.LSTM carry their state past the matrix with a gate.",
    )
    STATE_MEETS_ITSELF_PERMUTED = "the state is added to itself with its elements in another order", _ONE_LAYOUT
    STATE_RETURNED_PERMUTED = (
        "a block returns its state with the elements in a different order",
        _ONE_LAYOUT,
    )
    ORDER_UNKNOWN = (
        "a block reorders the elements of its state and then views them in a shape through which the compiler cannot "
        "follow the order",
        _ONE_LAYOUT,
    )
    STATE_IN_A_CIRCLE = (
        "the tensors of the state feed one another element by element in a circle (position and velocity of an "
        "oscillator, or a complex multiplication written with real parts, for example)",
        "Let each tensor of the state feed only itself and the tensors after it.",
    )
    SHORTCUT_HAS_LAYER = (
        "the shortcut of this block {what}: it is not an elementwise path from the state to the next one",
        "Nothing to do if it is a strided or widening block: it stays exact, and the blocks before and after it form "
        "separate chains.",
    )
    FEATURES_CONCATENATED = (
        "features are concatenated (torch.cat, as in a DenseNet), not added: the state grows from block to block, so "
        "it has no elementwise path to the next one",
        "Only x + f(x) and gates make a highway: use blocks that add to a state of fixed width.",
    )
    STREAMS_MIXED = (
        "a matrix mixes the streams of the state at every step (hyper-connections): the scan multiplies element by "
        "element, so it has no elementwise path to the next state",
        "Nothing to do: its gradients are exact. Streams that only add to one another would be one chain.",
    )
    INTERRUPTED = (
        "between one block and the next the state itself goes through {operator}, which moves or mixes its elements: "
        "there is no elementwise path to the state after the next block",
        "Move it inside the blocks, or before the first block or after the last.",
    )
    WIDE_ELEMENTWISE_RECURRENCE = (
        "a recurrence that is entirely elementwise and carries several tensors from step to step: without blocks "
        "only a state of one tensor is recognised",
        f"{_TO_RECURRENT}, which handles such a state.",
    )

    # -- operators -------------------------------------------------------------------------------------------------
    NOT_LINEAR_IN_GRADIENT = (
        "the result of {operator} is not linear in the gradient",
        "Backward formulas that are not linear in the incoming gradient cannot be iterated. The usual cause is a "
        "custom autograd.Function or a hook on a tensor.",
    )
    ADDS_CONSTANT = (
        "a block's backward adds the constant {constant} to the gradient",
        "The usual cause is a custom autograd.Function: make its backward linear in the incoming gradient.",
    )
    COMPLEX = (
        "{what}: the compiler has no rule for this operator",
        f"{_TO_RECURRENT} if it is a loop over time: its states may be complex. Otherwise write it with the real and "
        "the imaginary part.",
    )
    NO_RULE_ON_TRUNK = (
        "on its way past the blocks the state goes through {operator}, an operator that the compiler has no rule for: "
        "it cannot tell whether this path is elementwise",
        f"Use other PyTorch operators there, or move it into the blocks; {_RULE}",
    )
    NO_RULE_IN_BLOCK = (
        "a block uses {operator}, an operator that the compiler has no rule for, so it cannot tell how a gradient "
        "passes through it",
        f"Write that part with other PyTorch operators, or move it out of the residual blocks; {_RULE}",
    )
    SIZE_NOT_AT_HAND = (
        "the size {size}, known only at run time (dynamic shapes), is not available in the backward pass",
        _OTHERWISE,
    )
    SIZE_NOT_GIVEN = "the size {size} is not a size of any input of the step", _OTHERWISE
    NOT_FOR_SEVERAL_BLOCKS = "{operator} cannot be evaluated for several blocks at once", _OTHERWISE
    CONSTANT_INSIDE = (
        "a block creates a constant tensor, which cannot be evaluated for several blocks at once",
        _OTHERWISE,
    )
    NO_BATCHING_RULE = "operator {operator} has no batching rule ({error})", _OTHERWISE
    TENSOR_BY_KEYWORD = "operator {operator} takes a tensor by keyword", _OTHERWISE
    DROPOUT_IN_ATTENTION = (
        "attention with dropout has no batching rule: its mask depends on the position in the batch",
        _OTHERWISE,
    )
    MASK_IN_ATTENTION = "{operator} with a mask has no batching rule: the mask's alignment would be lost", _OTHERWISE

    # -- recurrent modules -----------------------------------------------------------------------------------------
    PACKED_SEQUENCE = (
        "a packed sequence: its steps have batches of different sizes. PyTorch's own kernel is used",
        "Use a padded batch instead of the packed one.",
    )
    PACKED_BREAKS_GRAPH = (
        "a packed sequence: Dynamo breaks the graph at it, and the module runs in eager mode, with exact gradients"
    )
    PROJECTIONS = (
        "an LSTM with projections (proj_size). PyTorch's own kernel is used",
        "Leave out proj_size, and use a smaller hidden_size or a linear layer after the LSTM.",
    )
    MODULE_UNDER_AUTOCAST = (
        "under autocast PyTorch's own kernel is used",
        "Call it inside torch.autocast(device_type, enabled=False), or give the model and its inputs the lower "
        "precision themselves.",
    )
    CALLED_STEP_BY_STEP = (
        "called step by step in a loop: every call is a separate chain of one link",
        "Make one call for the whole sequence, use nn.GRUCell or nn.LSTMCell in the loop, or replace the loop by "
        "hwbp_compiler.recurrent(cell, inputs, state).",
    )

    # -- loops -----------------------------------------------------------------------------------------------------
    HIGHER_ORDER_LOOP = (
        "a loop written with torch's {name} may have any length: its steps are inside one operator, not in the graph",
        "Use hwbp_compiler.recurrent, nn.GRU, nn.LSTM, or a Python loop over a fixed number of steps.",
    )
    CELL_HOLDS_TENSOR = (
        "the cell holds a tensor that is not a parameter, buffer or captured variable",
        "Make the tensor outside the cell, or register it as a buffer.",
    )
    CELL_CONTAINS_MODULE = (
        "the cell contains a recurrent module ({module}), which has its own loop over time",
        "Use nn.GRUCell, nn.LSTMCell or nn.RNNCell for one step per call, or run the module before or after the loop "
        "if it does not need the state.",
    )
    CELL_DRAWS_RANDOM_NUMBERS = (
        "the cell draws random numbers ({operator}), which would differ when the step is computed again",
        "Draw them for all steps before the loop and pass them in as an input.",
    )
    CELL_RUNS_LOOP = (
        "the cell runs a loop of its own",
        "Write the inner loop's steps into the outer cell, or run the inner loop for all steps at once.",
    )
    CELL_CONTAINS_HIGHER_ORDER = (
        "the cell contains {operator}, which defines its own derivative",
        "Write that part with PyTorch operators, or move it out of the cell.",
    )
    CELL_SWITCHES_GRADIENTS = (
        "the cell switches gradients on or off",
        "Use x.detach() where no gradient should pass, or compute that part before the loop.",
    )
    CELL_WRITES_IN_PLACE = "the cell writes in place ({operator})", "Write the change as a new tensor."
    CELL_HAS_EFFECTS = (
        "the cell calls {operator} in every step only for its side effect",
        "Do this check or output outside the loop.",
    )
    CELL_UNTRACEABLE = "{error}", "Write the cell with operators that torch.compile can trace."

    # -- Python loops that stay unrolled -------------------------------------------------------------------------------
    SHAPES_DEPEND_ON_STEP = (
        "a tensor changes its shape from step to step, from {before} to {after} (in {operator})",
        "Keep shapes the same: write into a tensor made before the loop, and mask the entries not written yet.",
    )
    CONSTANT_DEPENDS_ON_STEP = (
        "a constant of {operator} is {before} in one step and {after} in the next",
        "Put such numbers into a tensor before the loop, and take numbers[t] in step t.",
    )
    STEP_LOOKS_FURTHER = (
        "in {operator} a step uses a result of a step other than the previous one, or not the same result in every "
        "step",
        "Pass it on from step to step, as part of the state.",
    )
    STEPS_TAKE_OTHER_THINGS = (
        "{operator} takes an argument in every step that is not a tensor",
        "Pass only tensors and numbers to the steps.",
    )
    NO_TENSOR_FROM_STEP = (
        "a step passes something on, to the next step or to the rest of the model, that is not a tensor",
        "Pass on only tensors.",
    )
    STEP_CHANGES_IN_PLACE = (
        "a step changes in place a tensor that it did not create",
        "Write the change as a new tensor: h = h * z, not h.mul_(z). (out[t] = y is allowed if no step reads out.)",
    )
    STEP_WRITES_OUTSIDE = (
        "a step writes into a tensor made before the loop, at a position that does not advance evenly",
        "Append to a list and stack it after the loop.",
    )
    WRITTEN_IS_READ = (
        "the steps read a tensor that they write into, or write into it in two places",
        "Carry what later steps need in a separate variable.",
    )
    CHANGED_AFTER_WRITE = (
        "a step changes a value in place after writing it into a tensor made before the loop",
        "Write a clone, or write the change as a new tensor.",
    )
    CHANGED_AFTER_LOOP = (
        "{operator} changes in place a result of a step, or watches its gradient",
        "Write the change as a new tensor, or clone the tensor first.",
    )

    # -- stages of a pipeline --------------------------------------------------------------------------------------
    STAGE_TAKES_MORE = (
        "the stage takes {taken} and returns {given} that require a gradient; a highway needs exactly one of each",
        "Pass one tensor from stage to stage; pass masks or positions as tensors that require no gradient.",
    )
    STAGE_CHANGES_STATE = (
        "the stage takes {before} and returns {after}: there is no elementwise path through it",
        "Cut the model so that the change of shape has its own stage or lies at the end of one.",
    )
    STAGE_GIVES_NO_GRADIENT = "the input of the stage requires no gradient: nothing before it is trained"
    STAGE_UNTRACEABLE = (
        "the stage cannot be traced ({error})",
        "Write it so that torch.export could trace it: no branch on a tensor's value.",
    )
    STAGE_DRAWS_UNSEEN = (
        "K depends on values that the stage computes with random numbers drawn in compiled code, which cannot be drawn "
        "again",
        "Compile only those blocks of the stage that draw none, or run the stage in eager mode.",
    )
    STAGE_OVERWRITES = (
        "K depends on {buffer}, which the stage overwrites",
        "Do not multiply the residual stream by a buffer that changes.",
    )
    STAGE_IS_SHARDED = (
        "K depends on parameters that are sharded (FSDP2), and needs whole ones",
        "Use DistributedDataParallel, or a model whose K is 1 (pre-LN).",
    )

    # -- defects ---------------------------------------------------------------------------------------------------
    DEFECT = "{error}", _DEFECT
    NOT_COMPILED = "the rewritten graph could not be compiled", _DEFECT
    DEFECT_IN_LOOP = "{error}", "This is a bug in hwbp_compiler. Please report it, with the cell."

    def __init__(self, text: str, advice: str = "") -> None:
        self.text, self.advice = text, advice

    def of(self, **values: Any) -> Why:
        """The reason with its text and advice filled in."""
        return Why(self, self.text.format(**values), self.advice.format(**values))


@dataclass(frozen=True)
class Why:
    """The reason for one chain: its ``code``, and the ``text`` and ``advice`` for the user."""

    code: Reason
    text: str
    advice: str = ""

    def after(self, words: str) -> Why:
        """The same reason, with ``words`` in front of its text."""
        return Why(self.code, f"{words}{self.text}", self.advice)


class Declined(Exception):
    """Raised when something cannot be rewritten soundly and is left exact; :attr:`why` gives the reason."""

    def __init__(self, why: Why | Reason) -> None:
        self.why = why.of() if isinstance(why, Reason) else why
        super().__init__(self.why.text)
