"""A callback for Lightning: the gradient is compared with the exact one while ``Trainer.fit`` runs.

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
    """Logs the gradient's cosine with the exact one, and changes options as the training proceeds.

    The model is ``model``, or else the first module in the ``LightningModule`` that is compiled with
    ``backend="highway"``. Figures go to the trainer's loggers as ``highway/cosine/k{k}_S{S}`` and
    ``highway/relative_error/k{k}_S{S}``.

    Args:
        model: what ``torch.compile`` returned; None to look for it.
        every: steps from one reading to the next (:class:`hwbp_compiler.GradientMeter`).
        milestones: options by the step from which they hold (:class:`hwbp_compiler.Schedule`).
        rungs: options to climb when the cosine falls (:class:`hwbp_compiler.Climb`).
        below: the cosine below which there is a warning, and the next rung.

    Raises:
        TypeError: when the training starts, and no compiled model is found.
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
        """The :class:`hwbp_compiler.GradientMeter`, while a training runs."""
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
