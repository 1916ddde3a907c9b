"""``highway::recurrent_module``: what ``torch.gru``, ``lstm``, ``rnn_tanh``, ``rnn_relu`` compute, as one operator.

AOTAutograd would take those functions apart, step of time by step of time. This operator stays whole: forward it calls
PyTorch's own kernel, whichever that is on the device (cuDNN, oneDNN, ATen), but of a GRU that records nothing on a CPU
ours (:mod:`.cpu`). Its backward pass is a second operator, ``highway::recurrent_module_backward``, that calls the
kernel's own. No graph and no code grows with the length. ``record`` names the tensors (input, states, weights) that
will need a gradient; where a pass puts Highway-BP in the place of ``recurrent_module_backward`` it also empties that
list, and the forward keeps nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hwbp_compiler.torch_private import below_autograd, recording_autograd

from . import cpu, kept
from .operator_call import OperatorCall

NAME = "highway::recurrent_module"
BACKWARD_NAME = "highway::recurrent_module_backward"

_OPTIONS = (
    "bool has_biases, int layers, float dropout, bool train, bool bidirectional, ScalarType? autocast, bool[] record"
)
library = torch.library.Library("highway", "FRAGMENT")
# A CUDA graph would replay the kernels, but skip the Python that keeps recordings between them (``kept``).
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
# Random: with dropout between layers, two equal calls must not be merged into one.
library.define(
    f"recurrent_module(str kind, Tensor input, Tensor? batch_sizes, Tensor[] state, Tensor[] weights, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(*_TAGS, torch.Tag.nondeterministic_seeded),
)
library.define(
    "recurrent_module_backward(str kind, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor output,"
    f" Tensor kept, Tensor input, Tensor? batch_sizes, Tensor[] state, Tensor[] weights, {_OPTIONS}, bool[] wanted)"
    " -> Tensor[]",
    tags=_TAGS,
)
operator = torch.ops.highway.recurrent_module.default
backward_operator = torch.ops.highway.recurrent_module_backward.default


def _recurrent(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *arguments, record = given
    call = OperatorCall(*arguments)
    if any(record):
        recording = _Recording(call, record)
        output, *last = (t.detach() for t in recording.outputs)
        # Code that runs later may write into the last states.
        return *_outputs(call.dtype, output, [t.clone() for t in last]), kept.token(recording)
    with below_autograd():
        ours = cpu.gru(call)
        if ours is not None:
            return *_outputs(call.dtype, ours[0], [ours[1]]), kept.token()
        # in training mode cuDNN would reserve memory for a backward pass
        output, *last = call._replace(train=call.random).run()
    return *_outputs(call.dtype, output, last), kept.token()


def _outputs(dtype: torch.dtype, output: Tensor, last: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Match what the fake kernel returns; c_n is empty where there is none."""
    output, h_n, *c_n = (t.to(dtype).contiguous() for t in (output, *last))
    return output, h_n, c_n[0] if c_n else output.new_empty(0)


class _Recording:
    """One run of the kernel, with the autograd graph that it recorded."""

    def __init__(self, call: OperatorCall, record: Sequence[bool]) -> None:
        with recording_autograd():
            tensors = (call.input, *call.state, *call.weights)
            self.leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, record, strict=True)]
            count = 1 + len(call.state)
            own = call._replace(input=self.leaves[0], state=self.leaves[1:count], weights=self.leaves[count:])
            self.outputs = own.run()

    def gradients(self, incoming: Sequence[Tensor | None]) -> list[Tensor | None]:
        pairs = [(o, g) for o, g in zip(self.outputs, incoming, strict=False) if g is not None and o.requires_grad]
        with recording_autograd():
            # Not autograd.grad: that checks for every node of the graph whether it leads to a leaf.
            torch.autograd.backward([o for o, _ in pairs], [g.to(o.dtype) for o, g in pairs])
        return [leaf.grad for leaf in self.leaves]


def _recurrent_backward(
    kind: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    output: Tensor,
    token: Tensor,
    *options: Any,
) -> list[Tensor]:
    *arguments, record, wanted = options
    assert all(recorded or not want for recorded, want in zip(record, wanted, strict=True)), "not recorded"
    recording = kept.take(token)
    if recording is None:  # a second backward pass through the same forward pass
        recording = _again(OperatorCall(kind, *arguments), record)
    found = recording.gradients((grad_output, grad_h_n, grad_c_n))
    return [
        leaf.new_empty(0) if not want else torch.zeros_like(leaf) if g is None else g.contiguous()
        for leaf, g, want in zip(recording.leaves, found, wanted, strict=True)
    ]


def _again(call: OperatorCall, record: Sequence[bool]) -> _Recording:
    if call.random:
        raise RuntimeError(
            "a second backward pass through a recurrent module with dropout between its layers: its random masks are "
            "not kept. Call the module again, or compile with approximating `iterations`, which separates the layers."
        )
    return _Recording(call, record)


def _fake(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = OperatorCall(*given[:-1])
    input, h = call.input, call.state[0]
    output = input.new_empty((*input.shape[:-1], h.shape[-1] * (1 + call.bidirectional)), dtype=call.dtype)
    c_n = h.new_empty(call.state[1].shape, dtype=call.dtype) if call.kind == "lstm" else output.new_empty(0)
    return output, h.new_empty(h.shape, dtype=call.dtype), c_n, torch.empty(1, dtype=torch.int64, device="cpu")


def _fake_backward(kind: str, *arguments: Any) -> list[Tensor]:
    input, _, state, weights = arguments[5:9]
    wanted = arguments[-1]
    return [t.new_empty(t.shape if want else 0) for t, want in zip((input, *state, *weights), wanted, strict=True)]


library.impl("recurrent_module", _recurrent, "CompositeExplicitAutograd")
library.impl("recurrent_module_backward", _recurrent_backward, "CompositeExplicitAutograd")
torch.library.register_fake(NAME, _fake, lib=library)
torch.library.register_fake(BACKWARD_NAME, _fake_backward, lib=library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    kind, input, batch_sizes, state, weights, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.kind, ctx.options, ctx.states = kind, options, len(state)
    ctx.save_for_backward(output[0], output[3], input, batch_sizes, *state, *weights)


def _backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
    output, token, input, batch_sizes, *rest = ctx.saved_tensors
    state, weights = rest[: ctx.states], rest[ctx.states :]
    _, needs_input, _, needs_state, needs_weights, *_ = ctx.needs_input_grad
    wanted = [needs_input, *needs_state, *needs_weights]
    if not any(g is not None for g in incoming[:3]):
        return (None,) * (5 + len(ctx.options))
    found = backward_operator(
        ctx.kind, *incoming[:3], output, token, input, batch_sizes, state, weights, *ctx.options, wanted
    )
    gradients = [g if want else None for g, want in zip(found, wanted, strict=True)]
    count = 1 + ctx.states
    return (None, gradients[0], None, gradients[1:count], gradients[count:], *(None for _ in ctx.options))


torch.library.register_autograd(NAME, _backward, setup_context=_setup_context, lib=library)


def _no_second_derivative(ctx: Any, *incoming: Any) -> Any:
    """Compiled graphs refuse this by themselves. This is for a graph that runs in eager mode after a failure."""
    raise RuntimeError(
        "double backward through a recurrent module of a model compiled with backend='highway' is not supported. Call "
        "the uncompiled model if you differentiate the gradient itself (create_graph=True)."
    )


torch.library.register_autograd(BACKWARD_NAME, _no_second_derivative, lib=library)


def _under_autocast(device: str) -> Any:
    """Compiled code runs without autocast, so tracing under autocast records what autocast would do."""

    def call(kind: str, input: Tensor, sizes: Any, state: Any, weights: Any, *options: Any) -> Any:
        *rest, _, record = options
        dtype: torch.dtype | None = torch.get_autocast_dtype(device)
        if device == "cuda" and torch.backends.cudnn.enabled:
            (input,), state, weights, dtype = _halved([input]), _halved(state), _halved(weights), None
        with torch.autocast(device, enabled=False):
            return operator(kind, input, sizes, state, weights, *rest, dtype, record)

    return call


def _halved(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What autocast does before it calls cuDNN: convert everything but float64 to float16."""
    return [t.half() if t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors]


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    library.impl("recurrent_module", _under_autocast(_device), _key)

# cuDNN warns about single layers (whose weights are part of the module's memory) and about freshly cast weights. It
# then packs the weights in every call, which costs little beside a run over time.
warnings.filterwarnings(
    "ignore", "RNN module weights are not part of single contiguous chunk of memory", UserWarning, __name__
)
