"""Time-series forecasting: a GRU reads three years of weekly CO2 and forecasts the next half year.

    python examples/forecast.py                           # the default options of the compiler
    python examples/forecast.py --method exact            # the same with exact backprop
    python examples/forecast.py --method highway --iterations 4

The series was measured on Mauna Loa from 1958 to 2001, in parts per million. It is part of the statsmodels package.
The last fifth is used for testing only. The log also gives the error of a common simple forecast: the value of the
same week one year earlier, plus the change over that year.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from data import shuffled
from torch import Tensor, nn
from training import Task, main, parser, positive

YEAR = 52


class Forecaster(nn.Module):
    """Maps [B, weeks] to [B, horizon], both relative to the last week read."""

    def __init__(self, hidden: int, layers: int, horizon: int) -> None:
        super().__init__()
        self.gru = nn.GRU(1, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, horizon)

    def forward(self, x):
        states, _ = self.gru(x.unsqueeze(-1))
        return self.head(states[:, -1])


def series() -> Tensor:
    """The series, [weeks]. Gaps are filled by linear interpolation."""
    from statsmodels.datasets import co2

    return torch.tensor(co2.load_pandas().data["co2"].interpolate().to_numpy(), dtype=torch.float32)


def samples(values: Tensor, length: int, horizon: int) -> tuple[Tensor, Tensor]:
    """All stretches of ``length`` weeks, and the ``horizon`` weeks after each, relative to the last week read."""
    cut = values.unfold(0, length + horizon, 1)
    last = cut[:, length - 1 : length]
    return cut[:, :length] - last, cut[:, length:] - last


def last_year(x: Tensor, horizon: int) -> Tensor:
    """The simple forecast: for each week the value one year earlier, plus the change over the last year."""
    return x[:, -YEAR : x.shape[1] - YEAR + horizon] - x[:, -YEAR - 1 : -YEAR]


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    p = parser(__doc__, method="auto", epochs=4, batch=16, lr=3e-3)
    p.add_argument("--hidden", type=int, default=64)
    p.add_argument("--layers", type=int, default=1)
    p.add_argument("--length", type=positive, default=3 * YEAR, help="weeks to read (%(default)s)")
    p.add_argument("--horizon", type=positive, default=YEAR // 2, help="weeks to forecast (%(default)s)")
    return p.parse_args(words)


def task(args: argparse.Namespace) -> Task:
    if args.length <= YEAR or args.horizon > YEAR:
        raise SystemExit(f"--length must be more than {YEAR} weeks, and --horizon at most {YEAR}: a year")
    values = series()
    split = len(values) * 4 // 5
    if args.length + args.horizon > len(values) - split:
        raise SystemExit(f"--length and --horizon together can be {len(values) - split} weeks at most")
    x, target = samples(values[:split], args.length, args.horizon)
    test_x, test_target = samples(values[split:], args.length, args.horizon)
    scale = x.std()  # only of the training part

    def error(forecast: Tensor) -> float:
        return ((forecast - test_target) ** 2).mean().sqrt().item()

    simple = error(last_year(test_x, args.horizon))

    def held_out(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        forecast = torch.cat([model(part.to(device)).cpu() for part in (test_x / scale).split(500)])
        return {"rmse_ppm": error(forecast * scale), "rmse_last_year": simple}

    torch.manual_seed(args.seed)
    model = Forecaster(args.hidden, args.layers, args.horizon)
    batch = shuffled(x / scale, target / scale, args.batch, args.seed)
    return Task(model, batch, F.mse_loss, held_out, max(1, len(x) // args.batch))


if __name__ == "__main__":
    args = arguments()
    main(task(args), args)
