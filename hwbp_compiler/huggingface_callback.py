"""``hwbp_compiler.huggingface.HighwayCallback``: a ``Trainer``'s model is compared with exact backprop as it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Trainer, TrainerCallback

from .auto.watching import Watching


class HighwayCallback(TrainerCallback):
    """Logs the gradient's cosine with the exact one, and changes options as the training proceeds.

        trainer.add_callback(HighwayCallback(trainer, every=100))

    Figures go where the trainer's logs go, as ``highway/cosine/k{k}_S{S}`` and ``highway/relative_error/k{k}_S{S}``.

    Args:
        trainer: the ``transformers.Trainer``. Its model is compiled when the training starts, and found there.
        every: steps from one reading to the next (:class:`hwbp_compiler.GradientMeter`). With gradient accumulation a
            step here is a forward and backward pass.
        milestones: options by the step of the optimizer from which they hold (:class:`hwbp_compiler.Schedule`).
        rungs: options to climb when the cosine falls (:class:`hwbp_compiler.Climb`).
        below: the cosine below which there is a warning, and the next rung.

    Raises:
        TypeError: when the training starts, and the model is not compiled with ``backend="highway"``.
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
        """The :class:`hwbp_compiler.GradientMeter`, while a training runs."""
        return self.watching.meter

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watching.start([self.trainer.model_wrapped, self.trainer.model])
        if found := self.watching.step():
            self.trainer.log(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watching.stop()
