"""``ScheduleHighway``: a pipeline whose backward pass runs in all stages at once (docs/design.md, section 7)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from hwbp_compiler import torch_private
from hwbp_compiler.reasons import Reason

from .agreement import agree_on_options, agree_on_plan, nothing_new
from .chains import Chain, Plan, StagePlan
from .crossing import Crossing, needs_products
from .errors import StageError, checked
from .faults import Watch
from .highway_of_stage import RandomState, StageHighway, conditions, find_highway, unwrapped
from .report import described
from .rounds import ends_of_segments

_WHERE = "ScheduleHighway"


class ScheduleHighway(ScheduleGPipe):
    """A pipeline schedule with GPipe's forward pass and a backward pass that runs in all stages at once.

    Every stage is a segment. Its own backward pass is exact; only what passes from stage to stage is approximate. The
    last stage holds the loss. Its exact input gradient is the head of the chain, and all ranks receive it. Then
    ``iterations`` rounds follow. In each round all stages compute an input gradient at once, and one all-gather and a
    scan follow. After the last round every stage computes its parameter gradients, once. A gradient path counts if it
    leaves the highway in at most k of the stages between the last stage and its own. With R stages, k >= R - 2 is
    ordinary backprop: the last stage is not a segment, so C = R - 1.

    A stage without a highway (a strided shortcut, an embedding, a change of width) stays exact: the stages before it
    wait for its input gradient. See docs/distributed.md.

    Args:
        stage: a stage of ``torch.distributed.pipelining``: a ``PipelineStage``, or a stage made by ``pipeline()``. Its
            outputs that require a gradient must all go to the next stage.
        n_microbatches, loss_fn, args_chunk_spec, kwargs_chunk_spec, output_merge_spec, scale_grads: as in
            ``torch.distributed.pipelining.ScheduleGPipe``.
        iterations: k, an integer >= 0, or "exact", which runs one stage after the other, like GPipe. It must be the
            same on all ranks.
        damping: gamma, a number in [0, 1]. It scales the K of every link by (1 - gamma) in the highway through a stage.

    Attributes:
        rounds: number of rounds in this rank's last backward pass.
        bytes: number of bytes that this rank received in its last backward pass.
        losses: losses of the last step, one for each micro-batch; only on the rank of the last stage.

    The recurrence is that of docs/design.md, section 4.6, "Segments". P_s is the highway through stage s, and out_s is
    its backward pass. All stages compute ``v_s = out_s(e^t_s) - P_s e^t_s`` at once, and then
    ``e^{t+1}_{s-1} = v_s + P_s e^{t+1}_s``.

    Raises:
        OptionError: a value is not allowed.
        StageError: this schedule cannot run the stage. The message says why.
        RankError: raised by ``step`` on every rank if one of them failed, or if ranks differ in options, versions or
            shapes.
    """

    def __init__(
        self,
        stage: Any,
        n_microbatches: int,
        loss_fn: Callable[..., Tensor] | None = None,
        *args: Any,
        iterations: int | Literal["exact"] = 4,
        damping: float = 0.0,
        **kwargs: Any,
    ) -> None:
        options = checked(_WHERE, iterations=iterations, damping=damping)
        if isinstance(stage, (list, tuple)):
            raise StageError(
                f"{_WHERE}: stage is a {type(stage).__name__} of {len(stage)}; it takes one stage per rank. "
                "Pass each rank its stage. Merge several stages on a rank into one with more layers."
            )
        ranks = dist.get_world_size(stage.group)
        if ranks != stage.num_stages:
            raise StageError(
                f"{_WHERE}: there are {stage.num_stages} stages on {ranks} ranks; it takes one stage per rank. Start "
                "as many processes as stages, or make fewer and longer stages."
            )
        self.losses: list[Tensor] = []
        super().__init__(stage, n_microbatches, loss_fn and self._keeping(loss_fn), *args, **kwargs)
        self.stage, self.batches, self.has_loss = stage, n_microbatches, loss_fn is not None
        self.iterations = None if options.iterations == "exact" else int(options.iterations)
        self.damping = float(options.damping)
        self._plan: Plan | None = None
        self._mine = StagePlan(dist.get_rank(stage.group))
        self._product: Tensor | None = None
        self.rounds = self.bytes = 0
        self._highway = StageHighway()
        self._seen: Any = None
        self._given: list[tuple[tuple[Any, ...], dict[str, Any], RandomState]] = []
        self._crossing: Crossing | None = None
        self._ends: list[Tensor] | None = None  # gradients of what the stage passes on; None for the loss
        self._with_loss = True
        self._ran_with_loss: bool | None = None  # torch determines shapes again when it changes
        self._watch = Watch(_WHERE, stage.group, f"stage {stage.stage_index}")
        self._forms: Any = None
        self._opened = False

    @property
    def plan(self) -> Plan | None:
        """The stages and the chains that they form; None before the first step."""
        return self._plan

    def explain(self) -> str:
        """What every stage is, and what crosses ranks; known after the first step with a loss."""
        if self._plan is None:
            return "Nothing is known before the first step."
        return described(self._plan, self.iterations, self.batches)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One training step, forward and backward. Arguments and result are those of ``ScheduleGPipe.step``.

        Raises:
            RankError: on every rank, if one of them failed, or if ranks differ in options, versions or shapes.
            StageError: this schedule cannot run the stage. The message says why.
        """
        with self._watch.guarded():
            return self._step(*args, **kwargs)

    def eval(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass alone. Arguments and result are those of ``ScheduleGPipe.eval``."""
        self._with_loss = False
        try:
            return super().eval(*args, **kwargs)
        finally:
            self._with_loss = True

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if not self._opened:
            options = {
                "iterations": "exact" if self.iterations is None else self.iterations,
                "damping": self.damping,
                "n_microbatches": self.batches,
                "scale_grads": self.scale_grads,
                "loss_fn given": self.has_loss,
            }
            agree_on_options(self.stage, options)
            self._opened = True
        self._given.clear()
        self.losses.clear()
        self._crossing = self._ends = None
        # Compiled stages run backward more than once, so what they save must outlive the first time.
        with self._answering(), torch_private.functorch_config.patch(donated_buffer=False):
            result = super().step(*args, **kwargs)
        if self._crossing is not None:
            self._crossing.finish()
            self.bytes = self._crossing.bytes
        self._given.clear()
        self.losses.clear()
        self._ends = self._product = None
        return result

    # -- what GPipe calls on the stage -------------------------------------------------------------------------------

    def _keeping(self, loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def keep(*args: Any, **kwargs: Any) -> Tensor:
            with self._watch.computing("it computes its loss"):
                loss = loss_fn(*args, **kwargs)
            self.losses.append(loss)
            return loss

        return keep

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """While this lasts, our functions replace the stage's methods that GPipe calls. Nothing is received or sent
        backward, and the rounds run before the first backward pass.
        """
        stage = self.stage
        forward = stage.forward_maybe_with_nosync
        # To determine shapes, torch runs the stage on uninitialised memory (seen in 2.13), which changes BatchNorm's
        # buffers.
        new_mode = self._ran_with_loss is not self._with_loss
        buffers = [(b, b.clone()) for b in stage.submod.buffers()] if new_mode else []

        def keeping(*args: Any, **kwargs: Any) -> Any:
            while buffers:
                buffer, value = buffers.pop()
                buffer.copy_(value)
            self._ran_with_loss = self._with_loss
            self._given.append((args, kwargs, RandomState.now(torch.device(stage.device))))
            with self._watch.computing(f"it runs its forward pass of micro-batch {len(self._given) - 1}"):
                output = forward(*args, **kwargs)
            self._same_forms(args, output)
            return output

        backward = stage.backward_one_chunk

        def computing(batch: int, *args: Any, **kwargs: Any) -> None:
            with self._watch.computing(f"it runs its backward pass of micro-batch {batch}"):
                backward(batch, *args, **kwargs)

        def received(batch: int) -> list[Any]:
            if batch == 0 and stage.has_backward:
                self._before_backward()
            return []

        def sent(batch: int) -> list[Any]:
            if stage.has_backward and not stage.is_first:
                stage.get_local_bwd_output(batch)  # clears it; nothing else reads it
            return []

        answers: dict[str, Callable[..., Any]] = {
            "forward_maybe_with_nosync": keeping,
            "backward_one_chunk": computing,
            "get_bwd_recv_ops": received,
            "get_bwd_send_ops": sent,
        }
        for name, answer in answers.items():
            setattr(stage, name, answer)
        try:
            yield
        finally:
            for name in answers:
                delattr(stage, name)

    def _same_forms(self, args: Any, output: Any) -> None:
        """Check that all micro-batches have the same shapes. torch's buffers have the size of the first micro-batch;
        torch (seen in 2.13) silently fills them only in part. The first stage's input and the last stage's output use
        no such buffers.
        """
        crossing = (() if self.stage.is_first else args), (() if self.stage.is_last else output)
        forms = [_form(t) for t in pytree.tree_leaves(crossing) if isinstance(t, Tensor)]
        key = self.stage.has_backward
        if self._forms is None or self._forms[0] != key:
            self._forms = key, forms
        if forms != self._forms[1]:
            raise StageError(
                f"{_WHERE}: stage {self.stage.stage_index} exchanges {_said(forms)} in a micro-batch, and "
                f"{_said(self._forms[1])} in the first. All micro-batches of a pipeline must be alike: leave out or "
                "pad the last batch of an epoch, and take a batch that n_microbatches divides."
            )

    # -- the backward pass before parameter gradients -----------------------------------------------------------

    def _before_backward(self) -> None:
        stage, index = self.stage, self.stage.stage_index
        del self._given[: -self.batches], self.losses[: -self.batches]  # remove torch's runs to determine shapes
        if isinstance(stage.submod, FSDPModule):  # like torch's schedules before all but the last backward pass
            stage.submod.set_is_last_backward(False)
            stage.submod.set_reshard_after_backward(False)
            stage.submod.set_requires_gradient_sync(False)
        plan = self._look()
        crossing = self._crossing = Crossing(stage.group, plan, torch.device(stage.device), self.batches)
        self.rounds, self._ends = 0, None
        for chain in plan.chains:
            if index in chain:
                self._ends = self._solve(crossing, plan, chain)
                self._take(self._ends)
                continue
            crossing.stand_by_for_products(chain)
            if index == chain.last + 1:
                crossing.give_head(chain, self._input_gradients(self._ends))
            else:
                crossing.stand_by_for_head(chain)
            crossing.stand_by_for_rounds(chain, chain.rounds(self.iterations))

    def _solve(self, crossing: Crossing, plan: Plan, chain: Chain) -> list[Tensor]:
        """This stage's part in its chain: the gradients of what it passes on, [M, *shape] each."""
        index = self.stage.stage_index
        products: dict[int, Tensor | float] = {}
        for s in chain.inner:
            number = plan.stages[s].number
            if number is not None:
                products[s] = number
        if needs_products(plan, chain):
            own = {} if self._product is None or index not in chain.inner else {index: self._product}
            gathered = crossing.gather(chain, own)
            products |= {s: p for s, p in gathered.items() if plan.stages[s].diagonal and s >= index}
        heads = crossing.take_head(chain)
        if chain.segments == 1:
            return heads
        found = ends_of_segments(
            chain,
            [index],
            heads[0],
            products,
            lambda s, e: self._input_gradients([e])[0],
            lambda rows: crossing.gather(chain, rows),
            self.iterations,
        )
        self.rounds = chain.rounds(self.iterations)
        return [found[index]]

    def _products(self) -> Tensor | None:
        """P_s of all micro-batches, damped: [M, *state]. None if it is a number, which is only checked."""
        rows = []
        for batch, (args, kwargs, random_state) in enumerate(self._given):
            output = self._differentiable(self.stage.fwd_cache[batch][0])[0]
            flat = pytree.tree_leaves((args, kwargs))
            product = self._highway.product(self.stage.submod, flat, output, random_state)
            rows += [] if product is None else [product]
        return torch.stack(rows) * (1.0 - self.damping) ** self._highway.links if rows else None

    def _input_gradients(self, ends: list[Tensor] | None) -> list[Tensor]:
        """Gradients of what came from the stage before, [M, *shape] each, but not of parameters. ``ends`` are the
        gradients of the output in the same form; None for the loss.
        """
        with self._watch.computing("it computes its input gradients"):
            return self._gradients_at_inputs(ends)

    def _gradients_at_inputs(self, ends: list[Tensor] | None) -> list[Tensor]:
        columns: list[list[Tensor]] = []
        for batch in range(self.batches):
            inputs = self._activations(batch)
            if ends is None:
                outputs, given = [self.losses[batch]], None
            else:
                outputs = self._sent(batch)
                given = [end[batch] for end in ends]
                pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if o.requires_grad]
                outputs, given = [o for o, _ in pairs], [g for _, g in pairs]
            wanted = [x for x in inputs if x.requires_grad]
            found: Iterator[Tensor | None] = iter(())
            if wanted and any(o.requires_grad for o in outputs):
                found = iter(torch.autograd.grad(outputs, wanted, given, retain_graph=True, allow_unused=True))
            gradients = [next(found, None) if x.requires_grad else None for x in inputs]
            columns.append([torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)])
        return [torch.stack(column).detach() for column in zip(*columns, strict=True)]

    def _take(self, ends: list[Tensor]) -> None:
        """Give the stage the gradients of its output in the place where it would have received them."""
        stage = self.stage
        for batch in range(self.batches):
            rows = dict(zip(self._places_sent(batch), (end[batch] for end in ends), strict=True))
            given = tuple(rows.get(place) for place in range(len(stage.grad_recv_info[batch])))
            stage.set_local_bwd_input(given, batch)

    # -- what crosses to the neighbours -------------------------------------------------------------------------

    def _activations(self, batch: int) -> list[Tensor]:
        """The tensors from the stage before that require a gradient; a mask or a table of positions does not."""
        args = self._given[batch][0]
        if self.stage.is_first:
            return []
        infos = [i for i in self.stage.args_recv_info[batch] if not i.is_root_arg]
        before = self.stage.stage_index - 1
        return [a for a, info in zip(args, infos, strict=True) if info.source == before and a.requires_grad]

    def _places_sent(self, batch: int) -> list[int]:
        """Outputs for which the next stage sends a gradient: those for which torch has allocated a buffer at its
        request.
        """
        after = self.stage.stage_index + 1
        infos, sends = self.stage.grad_recv_info[batch], self.stage.act_send_info
        return [i for i, info in enumerate(infos) if after in sends[i] and info.buffer is not None]

    def _sent(self, batch: int) -> list[Tensor]:
        outputs = self.stage.fwd_cache[batch][0]
        return [outputs[i] for i in self._places_sent(batch)]

    @staticmethod
    def _differentiable(outputs: Any) -> list[Tensor]:
        return [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]

    # -- the plan -----------------------------------------------------------------------------------------------

    def _look(self) -> Plan:
        """This step's plan. The ranks agree again if something changed on any rank, or if P_s could not be computed,
        because all ranks must know before they wait for it.
        """
        now, failure = self._signature(), None
        known = self._plan is not None and now == self._seen
        try:
            with self._watch.computing("it looks for the highway of its stage"):
                if not known:
                    self._mine = self._describe()
                idle = known and self._plan is not None and self._plan.is_exact_at(self.stage.stage_index)
                self._product = None if idle or self._highway.graph is None else self._products()
        except Exception as error:
            failure, self._seen = error, None
        if self._plan is None or not nothing_new(self.stage, known and failure is None):
            self._plan = agree_on_plan(self.stage, self.iterations, self._mine, failure)
        self._watch.agreed()
        self._seen = now
        return self._plan

    def _signature(self) -> Any:
        """What the stage's joint graph depends on, besides its code and Python state outside of modules."""
        args, kwargs, _ = self._given[0]
        flat, spec = pytree.tree_flatten((args, kwargs))
        forms = tuple((tuple(a.shape), a.dtype, a.requires_grad) if isinstance(a, Tensor) else repr(a) for a in flat)
        device = torch.device(self.stage.device).type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return forms, spec, conditions(self.stage.submod), autocast

    def _describe(self) -> StagePlan:
        stage, index = self.stage, self.stage.stage_index
        self._refuse()
        self._highway = StageHighway()
        takes = tuple(_form(a) for a in self._activations(0))
        name = type(unwrapped(stage.submod)).__name__
        rank = dist.get_rank(stage.group)
        if index in (0, stage.num_stages - 1):  # neither passes anything on along a highway
            return StagePlan(rank, takes=takes, module=name)
        if self.iterations is None:
            return StagePlan(rank, reason=Reason.EXACT_ASKED_FOR.text, takes=takes, module=name)
        args, kwargs, _ = self._given[0]
        self._highway = found = find_highway(stage.submod, args, kwargs)
        if found.why is not None:
            return StagePlan(rank, reason=found.why.text, takes=takes, module=name)
        kept = (1.0 - self.damping) ** found.links
        number = None if found.number is None else found.number * kept
        return StagePlan(rank, found.links, number, found.number is None, found.text, "", takes, name)

    def _refuse(self) -> None:
        stage, index = self.stage, self.stage.stage_index
        for place, output in enumerate(self.stage.fwd_cache[0][0]):
            beyond = [d for d in stage.act_send_info.get(place, []) if d is not None and d != index + 1]
            if beyond and isinstance(output, Tensor) and output.requires_grad:
                raise StageError(
                    f"{_WHERE}: stage {index} sends its output {place} to stage {beyond[0]}, past stage {index + 1}, "
                    "and needs its gradient back. Only neighbours may exchange gradients here. Pass the tensor through "
                    f"stage {index + 1}, or use torch's ScheduleGPipe."
                )
        ends = [*self.losses, *self._differentiable(stage.fwd_cache[0][0])]
        if torch_private.runs_backward_once(ends):
            raise StageError(
                f"{_WHERE}: stage {index} was compiled before its first step here, so its backward pass can run only "
                "once. Let the schedule make the first call of a compiled stage, or set "
                "torch._functorch.config.donated_buffer = False before that call."
            )
        handed = [] if index == stage.num_stages - 1 else self._differentiable(stage.fwd_cache[0][0])
        crossing = [t for t in (*self._activations(0), *handed) if t.is_complex()]
        if crossing:  # torch (seen in 2.13) allocates no buffer for them, so gradients silently end there
            raise StageError(
                f"{_WHERE}: stage {index} sends or receives {_said([_form(t) for t in crossing])} that require a "
                "gradient. torch's pipelines return no gradient for complex tensors: send torch.view_as_real of them."
            )
        if any(isinstance(a, DTensor) for a in self._given[0][0]):
            raise StageError(f"{_WHERE}: stage {index} is given a DTensor. Activations must be plain tensors.")


def _form(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _said(forms: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {list(shape)}" for shape, dtype in forms)
