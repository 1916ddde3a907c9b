"""Python loops over time as people write them, and some that cannot be rerolled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, I, H, T = 3, 4, 5, 6  # noqa: E741


@dataclass(frozen=True)
class PythonLoop:
    """``model(*args())``. ``lengths``: the lengths of its loops. ``recurrences``: how many Recurrences each loop
    becomes; none of them depends on a later one.
    """

    name: str
    model: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    lengths: tuple[int, ...] = (T,)
    recurrences: int = 1


@dataclass(frozen=True)
class Unrolled:
    """A loop that has to stay unrolled, for ``reason``."""

    name: str
    model: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    reason: str


class Of(nn.Module):
    """A function of modules and tensors, as a model."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def series(*sizes: int) -> Tensor:
    return torch.randn(*(sizes or (B, T, I))).requires_grad_()


LOOPS: list[PythonLoop] = []
REFUSED: list[Unrolled] = []


def loop(
    args: Callable[[], tuple[Any, ...]] = lambda: (series(),),
    lengths: tuple[int, ...] = (T,),
    recurrences: int = 1,
    **modules: Any,
):
    """A decorator for a function that is a loop over the modules made by ``args``."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        def model() -> nn.Module:
            return Of(function, **{name: make() for name, make in modules.items()})

        LOOPS.append(PythonLoop(function.__name__, model, args, lengths, recurrences))
        return function

    return add


def refused(reason: str, args: Callable[[], tuple[Any, ...]] = lambda: (series(),), **modules: Any):
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        def model() -> nn.Module:
            return Of(function, **{name: make() for name, make in modules.items()})

        REFUSED.append(Unrolled(function.__name__, model, args, reason))
        return function

    return add


def gru() -> nn.Module:
    return nn.GRUCell(I, H)


def lstm() -> nn.Module:
    return nn.LSTMCell(I, H)


def head() -> nn.Module:
    return nn.Linear(H, I)


# -- one state, in all the ways to go over time ----------------------------------------------------------------------


@loop(cell=gru)
def list_and_stack(m, x):
    h, states = x.new_zeros(B, H), []
    for t in range(x.shape[1]):
        h = m.cell(x[:, t], h)
        states.append(h)
    return torch.stack(states, dim=1)


@loop(cell=gru)
def last_state_only(m, x):
    h = torch.zeros(x.size(0), H)
    for t in range(x.size(1)):
        h = m.cell(x[:, t, :], h)
    return h


@loop(cell=gru, head=head)
def head_of_the_last_state_before_it_changes(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = m.cell(x[:, t], h)
        y = 3.0 * h
        h *= 0.9
    return m.head(torch.sigmoid(y)) + h.sum()


@loop(cell=gru, head=head)
def head_of_the_last_state(m, x):
    h = x.new_zeros(B, H)
    for x_t in x.unbind(1):
        h = m.cell(x_t, h)
        y = torch.tanh(m.head(h))
    return y


@loop(cell=gru)
def preallocated_output(m, x):
    h, out = x.new_zeros(B, H), x.new_empty(B, T, H)
    for t in range(T):
        h = m.cell(x[:, t], h)
        out[:, t] = h
    return out, h


@loop(cell=gru, head=head)
def preallocated_time_first(m, x):
    h, out = x.new_zeros(B, H), torch.zeros(T + 1, B, I)
    for t, x_t in enumerate(x.transpose(0, 1)):
        h = m.cell(x_t, h)
        out[t + 1] = m.head(h)
    return out


@loop(cell=gru)
def slices_of_width_one(m, x):
    h, out = x.new_zeros(B, H), torch.zeros(B, T, H)
    for t in range(T):
        h = m.cell(x[:, t : t + 1].squeeze(1), h)
        out[:, t : t + 1, :] = h.unsqueeze(1)
    return out


@loop(cell=gru)
def split_and_cat(m, x):
    h, states = x.new_zeros(B, H), []
    for x_t in x.split(1, dim=1):
        h = m.cell(x_t[:, 0], h)
        states += [h[:, None]]
    return torch.cat(states, 1)


@loop(cell=gru)
def chunk_in_reverse(m, x):
    h, states = x.new_zeros(B, H), []
    for x_t in reversed(x.chunk(T, dim=1)):
        h = m.cell(x_t.squeeze(1), h)
        states.insert(0, h)
    return torch.stack(states, 1)


@loop(cell=gru)
def from_the_end(m, x):
    h, states = x.new_zeros(B, H), [None] * T
    for t in range(T - 1, -1, -1):
        h = m.cell(x[:, t], h)
        states[t] = h
    return torch.stack(states)


@loop(cell=gru)
def select_and_narrow(m, x):
    h = x.new_zeros(B, H)
    total = 0.0
    for t in range(T):
        h = m.cell(x.select(1, t) + x.narrow(1, t, 1).squeeze(1), h)
        total = total + h.sum(1)
    return total


@loop(args=lambda: ([series(B, I) for _ in range(T)],), cell=gru)
def list_of_tensors(m, xs):
    h, states = xs[0].new_zeros(B, H), []
    for x_t in xs:
        h = m.cell(x_t, h)
        states.append(h)
    return states


@loop(args=lambda: (series(), torch.tensor([2, T, 4])), cell=gru)
def lengths_with_where(m, x, lengths):
    h = x.new_zeros(B, H)
    for t in range(T):
        new = m.cell(x[:, t], h)
        h = torch.where((t < lengths).unsqueeze(-1), new, h)
    return h


@loop(args=lambda: (series(), (torch.rand(B, T) > 0.3).double()), cell=gru)
def padding_mask(m, x, mask):
    h, states = x.new_zeros(B, H), []
    for x_t, keep in zip(x.unbind(1), mask.unbind(1), strict=True):
        keep = keep.unsqueeze(1)
        h = keep * m.cell(x_t, h) + (1 - keep) * h
        states.append(h)
    return torch.stack(states, 1)


@loop(args=lambda: (series(), series(B, H)), cell=gru)
def state_given(m, x, h):
    for t in range(T):
        h = m.cell(x[:, t], h)
    return h


@loop(lengths=(T - 1,), inner=lambda: nn.Linear(I, H), outer=lambda: nn.Linear(H, H))
def no_state_at_first(m, x):
    h = None
    for t in range(T):
        new = torch.tanh(m.inner(x[:, t]) if h is None else m.inner(x[:, t]) + m.outer(h))
        h = new if h is None else h + 0.5 * new
    return h


@loop(args=lambda: (series(B, 2 * T, I),), cell=gru)
def every_other_step_twice(m, x):
    h = x.new_zeros(B, H)
    for t in range(2 * T):
        h = m.cell(x[:, t], h) if t % 2 else h + 0.1 * m.cell(x[:, t], h)
    return h


@loop(lengths=(T - 1,), cell=gru, head=head)
def loss_in_the_loop(m, x):
    h, loss = x.new_zeros(B, H), 0.0
    for t in range(T - 1):
        h = m.cell(x[:, t], h)
        loss = loss + F.mse_loss(m.head(h), x[:, t + 1])
    return loss


@loop(cell=gru, head=head)
def sum_over_a_list(m, x):
    h, ys = x.new_zeros(B, H), []
    for t in range(T):
        h = m.cell(x[:, t], h)
        ys.append(m.head(h))
    return torch.stack(ys).sum(0) / len(ys), ys[2]


# -- other cells -----------------------------------------------------------------------------------------------------


@loop(cell=lstm)
def lstm_cell(m, x):
    h = c = x.new_zeros(B, H)
    states = []
    for t in range(T):
        h, c = m.cell(x[:, t], (h, c))
        states.append(h)
    return torch.stack(states, 1), c


@loop(args=lambda: (series(), (torch.rand(T, B) > 0.7).double()), cell=lstm)
def ppo_lstm_cell(m, x, done):
    h, c = x.new_zeros(B, H), x.new_zeros(B, H)
    out = torch.empty(T, B, H)
    for t, d in enumerate(done):
        keep = (1.0 - d).view(-1, 1)
        h, c = m.cell(x[:, t], (h * keep, c * keep))
        out[t] = h
    return out


@loop(args=lambda: (series(T, B, I), (torch.rand(T, B) > 0.7).double()), rnn=lambda: nn.LSTM(I, H))
def ppo_lstm_module(m, x, done):
    state = (x.new_zeros(1, B, H), x.new_zeros(1, B, H))
    hidden = []
    for x_t, d in zip(x, done, strict=True):
        keep = (1.0 - d).view(1, -1, 1)
        out, state = m.rnn(x_t.unsqueeze(0), (keep * state[0], keep * state[1]))
        hidden += [out]
    return torch.flatten(torch.cat(hidden), 0, 1), state


@loop(rnn=lambda: nn.GRU(I, H, batch_first=True))
def gru_module(m, x):
    h, states = x.new_zeros(1, B, H), []
    for t in range(T):
        y, h = m.rnn(x[:, t : t + 1], h)
        states.append(y[:, 0])
    return torch.stack(states, 1)


@loop(recurrences=2, rnn=lambda: nn.GRU(I, H, num_layers=2))
def gru_module_of_two_layers(m, x):
    h = x.new_zeros(2, B, H)
    for t in range(T):
        y, h = m.rnn(x[None, :, t], h)
    return y[0], h


@loop(
    args=lambda: (series(T, B, I), (torch.rand(T, B) > 0.7).double()),
    recurrences=2,
    rnn=lambda: nn.LSTM(I, H, num_layers=2),
)
def ppo_lstm_module_of_two_layers(m, x, done):
    state = (x.new_zeros(2, B, H), x.new_zeros(2, B, H))
    hidden = []
    for x_t, d in zip(x, done, strict=True):
        keep = (1.0 - d).view(1, -1, 1)
        out, state = m.rnn(x_t.unsqueeze(0), (keep * state[0], keep * state[1]))
        hidden.append(out)
    return torch.cat(hidden), state


@loop(recurrences=2, lower=gru, upper=lambda: nn.GRUCell(H, H))
def layers_stacked_by_hand(m, x):
    states, gains = x.new_zeros(B, 2, H), torch.linspace(0.8, 1.0, 2)[:, None]
    for t in range(T):
        lower, upper = (gains * states).unbind(1)
        lower = m.lower(x[:, t], lower)
        states = torch.stack([lower, m.upper(lower, upper)], dim=1)
    return states


@loop(a=lambda: nn.Linear(2, 2), b=lambda: nn.Linear(2, 2))
def states_stacked_along_different_dimensions(m, x):
    h, c = x.new_ones(2, 2), torch.linspace(0.1, 0.4, 4).view(2, 2)
    for t in range(T):
        both = h * c
        h = torch.stack([0.9 * both[0] + m.a(x[0, t, :2]), torch.tanh(both[1])], 0)
        c = torch.stack([0.5 * both[:, 0], torch.tanh(m.b(both[:, 1])) + 0.1], 1)
    return h + 2 * c


@loop(recurrences=2, lower=gru, upper=lambda: nn.GRUCell(H, H))
def two_layers_in_time(m, x):
    a = b = x.new_zeros(B, H)
    states = []
    for t in range(T):
        a = m.lower(x[:, t], a)
        b = m.upper(a, b)
        states.append(b)
    return torch.stack(states, 1)


@loop(lengths=(T, T), lower=gru, upper=lambda: nn.GRUCell(H, H))
def time_in_two_layers(m, x):
    for cell in (m.lower, m.upper):
        h, states = x.new_zeros(B, H), []
        for t in range(T):
            h = cell(x[:, t], h)
            states.append(h)
        x = torch.stack(states, 1)
    return x


@loop(lengths=(T, T), forward_cell=gru, backward_cell=gru)
def bidirectional(m, x):
    h, ahead = x.new_zeros(B, H), []
    for t in range(T):
        h = m.forward_cell(x[:, t], h)
        ahead.append(h)
    h, back = x.new_zeros(B, H), []
    for t in reversed(range(T)):
        h = m.backward_cell(x[:, t], h)
        back.append(h)
    return torch.cat([torch.stack(ahead, 1), torch.stack(back[::-1], 1)], -1)


@loop(recurrences=2, forward_cell=gru, backward_cell=gru)
def both_directions_in_one_loop(m, x):
    f = b = x.new_zeros(B, H)
    ahead, back = [], []
    for t in range(T):
        f, b = m.forward_cell(x[:, t], f), m.backward_cell(x[:, T - 1 - t], b)
        ahead.append(f)
        back.insert(0, b)
    return torch.cat([torch.stack(ahead, 1), torch.stack(back, 1)], 2)


@loop(lengths=(T, T - 1), encoder=gru, decoder=gru, head=head)
def encoder_and_decoder(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = m.encoder(x[:, t], h)
    given, ys = x.new_zeros(B, I), []
    for t in range(T - 1):
        h = m.decoder(given, h)
        given = x[:, t + 1]  # teacher forcing
        ys.append(m.head(h))
    return torch.stack(ys, 1)


@loop(cell=gru, head=head)
def outputs_fed_back(m, x):
    h, y, ys = x[:, 0] @ m.head.weight, x[:, 0], []
    for _ in range(T):
        h = m.cell(y, h)
        y = torch.tanh(m.head(h))
        ys.append(y)
    return torch.stack(ys, 1)


@loop(args=lambda: (series(), series(B, 7, H)), cell=lambda: nn.GRUCell(I + H, H))
def attention_over_a_memory(m, x, memory):
    h, states = memory.mean(1), []
    for t in range(T):
        weights = torch.softmax((memory @ h.unsqueeze(2)).squeeze(2), 1)
        context = (weights.unsqueeze(1) @ memory).squeeze(1)
        h = m.cell(torch.cat([x[:, t], context], 1), h)
        states.append(h)
    return torch.stack(states, 1), weights


@loop(args=lambda: (series(B, T, 2, 4, 4),), conv=lambda: nn.Conv2d(2 + 3, 12, 3, padding=1))
def conv_lstm(m, x):
    h = c = x.new_zeros(B, 3, 4, 4)
    for t in range(T):
        i, f, o, g = m.conv(torch.cat([x[:, t], h], 1)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return h


@loop(cell=gru, field=lambda: nn.Linear(H, H))
def ode_rnn(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        for _ in range(4):
            h = h + 0.25 * torch.tanh(m.field(h))
        h = m.cell(x[:, t], h)
    return h


@loop(field=lambda: nn.Linear(H, H), args=lambda: (series(B, H),))
def euler_without_inputs(m, h):
    for _ in range(T):
        h = h + 0.1 * torch.tanh(m.field(h))
    return h


class Peephole(nn.Module):
    def __init__(self):
        super().__init__()
        self.gates = nn.Linear(I + H, 4 * H)
        self.peep = nn.Parameter(torch.randn(3, H))

    def forward(self, x, state):
        h, c = state
        i, f, g, o = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
        i, f = torch.sigmoid(i + self.peep[0] * c), torch.sigmoid(f + self.peep[1] * c)
        c = f * c + i * torch.tanh(g)
        return torch.sigmoid(o + self.peep[2] * c) * torch.tanh(c), c


@loop(cell=Peephole)
def lstm_with_peepholes(m, x):
    state, states = (x.new_zeros(B, H), x.new_zeros(B, H)), []
    for t in range(T):
        state = m.cell(x[:, t], state)
        states.append(state[0])
    return torch.stack(states, 1)


@loop(cell=gru)
def zoneout_in_eval_mode(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = 0.1 * h + 0.9 * m.cell(x[:, t], h)
    return h


@loop(gate=lambda: nn.Linear(I, H), new=lambda: nn.Linear(I, H))
def min_gru(m, x):
    h, states = x.new_zeros(B, H), []
    for t in range(T):
        z = torch.sigmoid(m.gate(x[:, t]))
        h = (1 - z) * h + z * m.new(x[:, t])
        states.append(h)
    return torch.stack(states, 1)


@loop(inner=lambda: nn.Linear(I, H), norm=lambda: nn.LayerNorm(H), outer=lambda: nn.Linear(H, 2 * H))
def layer_norm_gru(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        z, r = m.outer(m.norm(h)).sigmoid().chunk(2, -1)
        h = z * h + (1 - z) * torch.tanh(m.inner(x[:, t]) * r)
    return h


@loop(embed=lambda: nn.Embedding(9, I), cell=gru, args=lambda: (torch.randint(9, (B, T)),))
def words(m, tokens):
    h, states = torch.zeros(B, H), []
    for t in range(tokens.shape[1]):
        h = m.cell(m.embed(tokens[:, t]), h)
        states.append(h)
    return torch.stack(states, 1)


@loop(
    embed=lambda: nn.Embedding(9, I), cell=lstm, norm=lambda: nn.LayerNorm(H), args=lambda: (torch.randint(9, (T, B)),)
)
def embedded_before_the_loop(m, tokens):
    h, c = torch.zeros(B, H), torch.zeros(B, H)
    states = []
    for x in m.embed(tokens):
        h, c = m.cell(x, (h, c))
        states.append(m.norm(h))
    return torch.stack(states)


@loop(args=lambda: (series(B, H), series(T, H, H)))
def weights_of_every_step(m, h, weights):
    for w in weights:
        h = h + torch.tanh(h @ w)
    return h


@loop(cell=gru, more=lambda: nn.Linear(H, H))
def two_steps_back(m, x):
    h = before = x.new_zeros(B, H)
    for t in range(T):
        h, before = m.cell(x[:, t], h) + 0.1 * m.more(before), h
    return h


@loop(cell=gru)
def several_columns(m, x):
    h, firsts = x.new_zeros(B, H), []
    for t in range(T):
        h = m.cell(x[:, t].flip(-1)[:, :I], h)
        firsts.append(h[:, :2])
    return torch.stack(firsts, 1), h[:, 3]


@loop(cell=gru, lengths=(T, T), args=lambda: (series(), series()))
def two_loops_of_one_cell(m, x, y):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = m.cell(x[:, t], h)
    first = h
    h = torch.tanh(h)
    for t in range(T):
        h = m.cell(y[:, t], h)
    return first, h


@loop(lengths=(T - 1,), cell=gru, head=head)
def loss_added_in_place(m, x):
    h, loss = x.new_zeros(B, H), 0.0
    for t in range(T - 1):
        h = m.cell(x[:, t], h)
        loss += F.mse_loss(m.head(h), x[:, t + 1])
    return loss


@loop(cell=gru, gates=lambda: nn.Linear(I, 2 * I))
def input_taken_apart_in_the_step(m, x):
    h, both = x.new_zeros(B, H), m.gates(x)
    for t in range(T):
        a, b = both[:, t].chunk(2, -1)
        h = m.cell(a * torch.sigmoid(b), h)
    return h


@loop(cell=gru, args=lambda: (series(), (torch.rand(B, T) > 0.3).double()))
def masked_in_place_in_the_step(m, x, keep):
    h, states = x.new_zeros(B, H), []
    for t in range(T):
        h = m.cell(x[:, t], h)
        h *= keep[:, t : t + 1]
        states.append(h)
    return torch.stack(states, 1)


@loop(cell=gru, head=head)
def targets_without_gradient(m, x):
    with torch.no_grad():
        targets = x.unbind(1)
    h, loss = x.new_zeros(B, H), 0.0
    for t in range(T):
        h = m.cell(x[:, t], h)
        loss = loss + F.mse_loss(m.head(h), targets[t])
    return loss


@loop(cell=gru)
def looked_at_without_gradient(m, x):
    h, states = x.new_zeros(B, H), []
    for t in range(T):
        h = m.cell(x[:, t], h)
        states.append(h)
    with torch.no_grad():
        firsts = [state[:, 0] for state in states]
    return torch.stack(firsts, 1), h


@loop(cell=gru)
def start_counted_from_the_end(m, x):
    h = x.narrow(1, -1, 1)[:, 0] @ m.cell.weight_ih[:I, :].new_ones(I, H)
    for t in range(T):
        h = m.cell(x[:, t], h)
    return h


@loop(cell=gru)
def rows_seen_in_another_shape(m, x):
    h, seen = x.new_zeros(B, H), []
    for t in range(T):
        e = torch.tanh(x[:, t])
        seen.append(e)
        h = m.cell(e, h)
    return h, seen[1].view(-1)


@loop(lengths=(T,), cell=gru, head=head)
def head_of_the_last_state_under_autocast(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = m.cell(x[:, t], h)
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            y = m.head(h)
    return y


# -- what has to stay unrolled -----------------------------------------------------------------------------------------


@refused("random numbers", cell=gru, drop=lambda: nn.Dropout(0.3))
def dropout_in_the_step(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = m.cell(m.drop(x[:, t]), h)
    return h


@refused("random numbers", cell=gru)
def noise_in_the_step(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = m.cell(x[:, t], h + 0.01 * torch.randn(B, H))
    return h


@refused("in place", inner=lambda: nn.Linear(I, H))
def state_changed_in_place(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h.add_(m.inner(x[:, t]))
        h = h * 0.5
    return h


@refused("in place", cell=gru, memory=lambda: nn.BatchNorm1d(H))
def buffer_changed_in_place(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = m.cell(x[:, t], h)
        m.memory.running_mean.mul_(0.9).add_(h.detach().mean(0))
    return h


@refused("in place", cell=gru, norm=lambda: nn.BatchNorm1d(H))
def running_statistics(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = m.norm(m.cell(x[:, t], h))
    return h


@refused("a constant of", cell=gru)
def constant_of_the_step(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = 0.9**t * m.cell(x[:, t], h)
    return h


@refused("a constant of", cell=gru)
def step_number_added(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = m.cell(x[:, t] + t, h)
    return h


@refused("changes its shape from step to step", cell=lambda: nn.GRUCell(I + H, H))
def attention_over_all_states(m, x):
    h = x.new_zeros(B, H)
    states = h[:, None]
    for t in range(T):
        weights = torch.softmax((states @ h.unsqueeze(2)).squeeze(2), 1)
        context = (weights.unsqueeze(1) @ states).squeeze(1)
        h = m.cell(torch.cat([x[:, t], context], 1), h)
        states = torch.cat([states, h[:, None]], 1)
    return h


@refused("read a tensor that they write into", cell=lambda: nn.GRUCell(I + H, H))
def memory_written_and_read(m, x):
    h, memory = x.new_zeros(B, H), torch.zeros(B, T, H)
    for t in range(T):
        h = m.cell(torch.cat([x[:, t], memory.mean(1)], 1), h)
        memory[:, t] = h
    return h


@refused("changes in place a result of a step", cell=gru)
def changed_behind_the_loop(m, x):
    h, states = x.new_zeros(B, H), []
    for t in range(T):
        h = m.cell(x[:, t], h)
        states.append(h * 2)
    states[1] += 1.0
    return torch.stack(states, 1)


@refused("does not advance evenly", cell=gru)
def uneven_places(m, x):
    h, out = x.new_zeros(B, H), torch.zeros(B, T * T, H)
    for t in range(T):
        h = m.cell(x[:, t], h)
        out[:, t * t] = h
    return out


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-0.1, 0.1)


@refused("its own derivative", cell=gru)
def gradient_clipped_by_a_function(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = Clipped.apply(m.cell(x[:, t], h))
    return h


@refused("its own derivative", cell=gru)
def checkpointed_steps(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = torch.utils.checkpoint.checkpoint(m.cell, x[:, t], h, use_reentrant=False)
    return h


@refused("switches gradients", cell=gru, other=gru)
def step_without_gradients(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        with torch.no_grad():
            target = m.other(x[:, t], h)
        h = m.cell(x[:, t], h) + 0.1 * target
    return h


@refused("recurrent module", rnn=lambda: nn.GRU(I, H, batch_first=True), args=lambda: (series(B, 2 * T, I),))
def module_of_two_steps(m, x):
    h = x.new_zeros(1, B, H)
    for t in range(T):
        _, h = m.rnn(x[:, 2 * t : 2 * t + 2], h)
    return h


@refused("a step other than the previous one", cell=gru, head=lambda: nn.Linear(H, I))
def the_third_state_again(m, x):
    h, third = x.new_zeros(B, H), x[:, 0]
    for t in range(T):
        h = m.cell(x[:, t] + third, h)
        if t == 2:
            third = m.head(h)
        else:
            m.head(h)
    return h


@refused("random numbers", rnn=lambda: nn.LSTM(I, H, num_layers=2, dropout=0.5))
def module_with_dropout(m, x):
    state = (x.new_zeros(2, B, H), x.new_zeros(2, B, H))
    for t in range(T):
        y, state = m.rnn(x[None, :, t], state)
    return y


@refused("a constant of setitem", cell=lambda: nn.GRUCell(I + T, H))
def one_hot_of_the_step(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        place = x.new_zeros(B, T)
        place[:, t] = 1.0
        h = m.cell(torch.cat([x[:, t], place], 1), h)
    return h


@refused("after writing it", cell=gru, args=lambda: (series(), (torch.rand(B, T) > 0.3).double()))
def changed_after_it_was_written(m, x, keep):
    h, out = x.new_zeros(B, H), x.new_zeros(B, T, H)
    for t in range(T):
        h = m.cell(x[:, t], h)
        out[:, t] = h
        h *= keep[:, t : t + 1]
    return out


@refused("changes in place a result of a step", cell=gru)
def changed_by_place_of_the_argument(m, x):
    h, states = x.new_zeros(B, H), []
    for t in range(T):
        h = m.cell(x[:, t], h)
        states.append(h * 1.5)
    out = F.relu(states[-1], True)
    return torch.stack(states, 1), out


@refused("does not advance evenly", cell=gru)
def spread_over_two_places(m, x):
    h, out = x.new_zeros(B, H), torch.zeros(B, 2 * T, H)
    for t in range(T):
        h = m.cell(x[:, t], h)
        out[:, 2 * t : 2 * t + 2] = h.unsqueeze(1)
    return out


@refused("only for its side effect", cell=gru)
def asserted_in_every_step(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = m.cell(x[:, t], h)
        torch._assert_async(torch.isfinite(h).all())
    return h


@refused("in place", cell=gru)
def state_cut_off_in_place(m, x):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = m.cell(x[:, t], h)
        h.detach_()
    return h + m.cell(x[:, 0], h)
