"""``hwbp_compiler.huggingface.HighwayCallback``: compare a model with exact backprop while a ``Trainer`` trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Trainer, TrainerCallback

from .auto.watching import Watching


class HighwayCallback(TrainerCallback):
    """Logs the gradient's cosine with the exact one, and can change options during training.

        trainer.add_callback(HighwayCallback(trainer, every=100))

    The numbers go into the trainer's logs as ``highway/cosine/k{k}_S{S}`` and ``highway/relative_error/k{k}_S{S}``. A
    training that resumes continues its milestones, and climbs ``rungs`` again from the first.

    Args:
        trainer: the ``transformers.Trainer``. The callback finds its compiled model when the training starts.
        every: steps from one reading to the next (:class:`hwbp_compiler.GradientMeter`). With gradient accumulation
            each forward and backward pass counts as a step here.
        milestones: maps a step of the optimizer to the options that hold from that step on
            (:class:`hwbp_compiler.Schedule`).
        rungs: options to try one after another when the cosine is too low (:class:`hwbp_compiler.Climb`).
        below: below this cosine, log a warning and take the next of ``rungs``.

    Raises:
        TypeError: the model was not compiled with ``backend="highway"`` when the training started.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        every: int = 200,
        milestones: Mapping[int, Mapping[str, Any]] | None = None,
        rungs: Sequence[Mapping[str, Any]] | None = None,
        below: float = 0.95,
    ) -> None:
        self.trainer = trainer
        self.watching = Watching(every, milestones, rungs, below)

    @property
    def meter(self) -> Any:
        """The :class:`hwbp_compiler.GradientMeter` while the model trains; None before and after."""
        return self.watching.meter

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watching.start([self.trainer.model_wrapped, self.trainer.model], state.global_step)
        if found := self.watching.step():
            self.trainer.log(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watching.stop()
