"""A callback for Lightning that compares the gradient with the exact one while ``Trainer.fit`` runs.

    from hwbp_compiler.lightning import HighwayCallback

    trainer = lightning.Trainer(callbacks=[HighwayCallback(every=100)])

Needs the ``lightning`` package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from .auto.watching import Watching


class HighwayCallback(Callback):
    """Logs the gradient's cosine with the exact one, and can change options during training.

    The numbers go to the trainer's loggers as ``highway/cosine/k{k}_S{S}`` and ``highway/relative_error/k{k}_S{S}``.

    Args:
        model: what ``torch.compile`` returned. None: the first module in the ``LightningModule`` that is compiled with
            ``backend="highway"``.
        every: steps from one reading to the next (:class:`hwbp_compiler.GradientMeter`).
        milestones: maps a training batch, counted from 0, to the options that hold from there on
            (:class:`hwbp_compiler.Schedule`).
        rungs: options to try one after another when the cosine is too low (:class:`hwbp_compiler.Climb`).
        below: below this cosine, log a warning and take the next of ``rungs``.

    Raises:
        TypeError: no compiled model was found when the training started.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        every: int = 200,
        milestones: Mapping[int, Mapping[str, Any]] | None = None,
        rungs: Sequence[Mapping[str, Any]] | None = None,
        below: float = 0.95,
    ) -> None:
        self.model = model
        self.watching = Watching(every, milestones, rungs, below)

    @property
    def meter(self) -> Any:
        """The :class:`hwbp_compiler.GradientMeter` while the model trains; None before and after."""
        return self.watching.meter

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watching.start([pl_module] if self.model is None else [self.model])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        found = self.watching.step()
        for logger in trainer.loggers if found else ():
            logger.log_metrics(found, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watching.stop()

    def state_dict(self) -> dict[str, Any]:
        return self.watching.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.watching.load_state_dict(state_dict)
