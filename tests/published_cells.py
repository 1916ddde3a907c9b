"""Recurrent cells from the literature, for ``hwbp_compiler.recurrent`` and for the oracle.

Each cell is written once, as ``step(hold, x, *state)``. If ``hold`` is the identity, it is the cell as published. The
oracle cuts what passes through ``hold``: every product of the state with a matrix, and everything else that mixes its
elements (a mean). The remaining paths are elementwise: K. Cells whose gradient is exact hold nothing. If a paper adds x
to a state, a matrix first brings x to the width of that state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cells import BATCH, HIDDEN, INPUT
from torch import Tensor, nn, relu, sigmoid, tanh

from hwbp_compiler.testing.reference import Link, Program

# The report's text for cells without approximation at any k.
LINEAR = "exact at k = 0"
NO_PATH = "no elementwise path"
CIRCLE = "feed one another element by element in a circle"


def same(t: Tensor) -> Tensor:
    return t


class Cell(nn.Module):
    """A cell whose parameters are described by ``maps``. Its first state is the output unless it says otherwise.

    maps     W..: a matrix from the input, with a bias; U..: from the hidden state; P..: from the hidden state to
             INPUT; V..: from there to the hidden state; v..: a vector; s..: a number. ":3" makes it three times as long
    widths   of the state's tensors
    lowest   the first state is drawn between this number and 1
    exact    the report's text if the gradient is that of backprop; "" if it is truncated
    """

    maps = ""
    widths: tuple[int, ...] = (HIDDEN,)
    lowest = -1.0
    exact = ""

    def __init__(self) -> None:
        super().__init__()
        for entry in self.maps.split():
            name, _, times = entry.partition(":")
            n = int(times or 1)
            made: dict[str, Callable[[], Any]] = {
                "W": lambda n=n: nn.Linear(INPUT, n * HIDDEN),
                "U": lambda n=n: nn.Linear(HIDDEN, n * HIDDEN, bias=False),
                "P": lambda n=n: nn.Linear(HIDDEN, n * INPUT, bias=False),
                "V": lambda n=n: nn.Linear(INPUT, n * HIDDEN, bias=False),
                "v": lambda n=n: nn.Parameter(torch.empty(n * HIDDEN).uniform_(-1.0, 1.0)),
                "s": lambda n=n: nn.Parameter(torch.empty(()).uniform_(-1.0, 1.0)),
            }
            setattr(self, name, made[name[0]]())

    def forward(self, x, state):
        before = (state,) if isinstance(state, Tensor) else state
        after = self.after(same, x, before)
        return self.output(x, before, after), after[0] if isinstance(state, Tensor) else after

    def after(self, hold, x, before):
        made = self.step(hold, x, *before)
        return (made,) if isinstance(made, Tensor) else made

    def output(self, x, before, after):
        return after[0]

    def retold(self, state, side, hold):
        return self.after(hold, *side, state), ()

    def states(self, run_chain, x, state):
        """The state before and after every step, as the oracle's chains."""
        return run_chain([Link(self.retold, (x_t,)) for x_t in x.unbind(0)], state).states


# -- gated units with one state -----------------------------------------------------------------------------------


class MGU(Cell):
    """Zhou, Wu, Zhang, Zhou 2016, Minimal gated unit for recurrent neural networks."""

    maps = "Wf Uf Wn Un"

    def step(self, hold, x, h):
        f = sigmoid(self.Wf(x) + hold(self.Uf(h)))
        return (1 - f) * h + f * tanh(self.Wn(x) + hold(self.Un(f * h)))


class MGU2(Cell):
    """Heck and Salem 2017, Simplified minimal gated unit variations: the gate sees the state alone."""

    maps = "Uf Wn Un"

    def step(self, hold, x, h):
        f = sigmoid(hold(self.Uf(h)))
        return torch.lerp(h, tanh(self.Wn(x) + hold(self.Un(f * h))), f)


class ResetBeforeGRU(Cell):
    """Cho et al. 2014, Learning phrase representations: the reset gate acts before the product."""

    maps = "W:2 U:2 Wn Un"

    def gates(self, hold, x, h):
        return self.W(x) + hold(self.U(h))

    def step(self, hold, x, h):
        z, r = sigmoid(self.gates(hold, x, h)).chunk(2, -1)
        return z * h + (1 - z) * tanh(self.Wn(x) + hold(self.Un(r * h)))


class GRU1(ResetBeforeGRU):
    """Dey and Salem 2017, Gate-variants of GRU networks: gates of the state and a bias."""

    maps = "U:2 v:2 Wn Un"

    def gates(self, hold, x, h):
        return hold(self.U(h)) + self.v


class GRU2(ResetBeforeGRU):
    """Dey and Salem 2017: gates of the state alone."""

    maps = "U:2 Wn Un"

    def gates(self, hold, x, h):
        return hold(self.U(h))


class GRU3(ResetBeforeGRU):
    """Dey and Salem 2017: gates of a bias alone."""

    maps = "v:2 Wn Un"

    def gates(self, hold, x, h):
        return self.v


class UGRNN(Cell):
    """Collins, Sohl-Dickstein, Sussillo 2017, Capacity and trainability in recurrent neural networks."""

    maps = "Wc Uc Wg Ug"

    def step(self, hold, x, h):
        g = sigmoid(self.Wg(x) + hold(self.Ug(h)) + 1.0)
        return g * h + (1 - g) * tanh(self.Wc(x) + hold(self.Uc(h)))


class IntersectionRNN(Cell):
    """Collins, Sohl-Dickstein, Sussillo 2017: a gated state, and an output with a gate of its own (+RNN)."""

    maps = "W:2 U:2 Wy:2 Uy:2 Wx"

    def step(self, hold, x, h):
        n, g = (self.W(x) + hold(self.U(h))).chunk(2, -1)
        return sigmoid(g) * h + (1 - sigmoid(g)) * tanh(n)

    def output(self, x, before, after):
        n, g = (self.Wy(x) + self.Uy(before[0])).chunk(2, -1)
        return sigmoid(g) * self.Wx(x) + (1 - sigmoid(g)) * relu(n)


class MUT1(Cell):
    """Jozefowicz, Zaremba, Sutskever 2015, An empirical exploration of recurrent network architectures."""

    maps = "W Wz Wr Ur U"

    def step(self, hold, x, h):
        z, r = sigmoid(self.Wz(x)), sigmoid(self.Wr(x) + hold(self.Ur(h)))
        return tanh(hold(self.U(r * h)) + tanh(self.W(x))) * z + h * (1 - z)


class MUT3(Cell):
    """Jozefowicz, Zaremba, Sutskever 2015: the update gate sees tanh(h)."""

    maps = "W Wz Uz Wr Ur U"

    def step(self, hold, x, h):
        z, r = sigmoid(self.Wz(x) + hold(self.Uz(tanh(h)))), sigmoid(self.Wr(x) + hold(self.Ur(h)))
        return tanh(hold(self.U(r * h)) + self.W(x)) * z + h * (1 - z)


class STAR(Cell):
    """Turkoglu et al. 2019, Gating revisited: a tanh around the highway."""

    maps = "Wk Uk Wz"

    def step(self, hold, x, h):
        k = sigmoid(self.Wk(x) + hold(self.Uk(h)))
        return tanh((1 - k) * h + k * tanh(self.Wz(x)))


class CFN(Cell):
    """Laurent and von Brecht 2017, A recurrent neural network without chaos: the highway is gate times tanh'."""

    maps = "W:2 U:2 Wn"

    def step(self, hold, x, h):
        forget, take = sigmoid(self.W(x) + hold(self.U(h))).chunk(2, -1)
        return forget * tanh(h) + take * tanh(self.Wn(x))


class DeltaRNN(Cell):
    """Ororbia, Mikolov, Reitter 2017, Learning simpler language models with the differential state framework."""

    maps = "W Wr U va vb vc"

    def step(self, hold, x, h):
        d, e, r = self.W(x), hold(self.U(h)), sigmoid(self.Wr(x))
        return tanh((1 - r) * tanh(self.va * d * e + self.vb * d + self.vc * e) + r * h)


class GORU(Cell):
    """Jing et al. 2019, Gated orthogonal recurrent units; here the matrix need not be orthogonal."""

    maps = "W:3 U:3 vb"

    def step(self, hold, x, h):
        (xz, xr, xn), (hz, hr, hn) = self.W(x).chunk(3, -1), hold(self.U(h)).chunk(3, -1)
        z, n = sigmoid(xz + hz), xn + sigmoid(xr + hr) * hn
        return z * h + (1 - z) * torch.sign(n) * relu(n.abs() + self.vb)  # modReLU


class FastRNN(Cell):
    """Kusupati et al. 2018, FastGRNN: a weighted residual connection."""

    maps = "W U sa sb"

    def step(self, hold, x, h):
        return sigmoid(self.sa) * tanh(self.W(x) + hold(self.U(h))) + sigmoid(self.sb) * h


class FastGRNN(Cell):
    """Kusupati et al. 2018: gate and candidate share their matrices."""

    maps = "W U vz vn sa sb"

    def step(self, hold, x, h):
        shared = self.W(x) + hold(self.U(h))
        z, n = sigmoid(shared + self.vz), tanh(shared + self.vn)
        return (sigmoid(self.sa) * (1 - z) + sigmoid(self.sb)) * n + z * h


class HighwayRNN(Cell):
    """Zilly et al. 2017, Recurrent highway networks, recurrence depth 1."""

    maps = "W:2 U:2"

    def layer(self, n, t, h):
        return tanh(n) * sigmoid(t) + h * (1 - sigmoid(t))

    def step(self, hold, x, h):
        return self.layer(*(self.W(x) + hold(self.U(h))).chunk(2, -1), h)


class DeepHighwayRNN(HighwayRNN):
    """Zilly et al. 2017, recurrence depth 2: the highway is a product of two gates."""

    maps = "W:2 U:2 U2:2 v2:2"

    def step(self, hold, x, h):
        h = super().step(hold, x, h)
        return self.layer(*(hold(self.U2(h)) + self.v2).chunk(2, -1), h)


class GRUD(ResetBeforeGRU):
    """Che et al. 2018, Recurrent neural networks for multivariate time series with missing values: the state decays."""

    maps = "W:2 U:2 Wn Un Wd"

    def step(self, hold, x, h):
        return super().step(hold, x, torch.exp(-relu(self.Wd(x))) * h)


class NBRC(Cell):
    """Vecoven, Ernst, Drion 2021, A bio-inspired bistable recurrent cell, neuromodulated: a h is elementwise."""

    maps = "Wa Ua Wc Uc W"

    def step(self, hold, x, h):
        a, c = 1 + tanh(self.Wa(x) + hold(self.Ua(h))), sigmoid(self.Wc(x) + hold(self.Uc(h)))
        return c * h + (1 - c) * tanh(self.W(x) + a * h)


class BRC(Cell):
    """Vecoven, Ernst, Drion 2021: no matrix sees the state."""

    maps = "Wa va Wc vc W"

    def step(self, hold, x, h):
        a, c = 1 + tanh(self.Wa(x) + self.va * h), sigmoid(self.Wc(x) + self.vc * h)
        return c * h + (1 - c) * tanh(self.W(x) + a * h)


class IndGRU(Cell):
    """Li et al. 2018, Independently recurrent neural network, as a GRU: recurrent weights are vectors."""

    maps = "W:3 vz vr vn"

    def step(self, hold, x, h):
        z, r, n = self.W(x).chunk(3, -1)
        z, r = sigmoid(z + self.vz * h), sigmoid(r + self.vr * h)
        return z * h + (1 - z) * tanh(n + self.vn * (r * h))


class SRU(Cell):
    """Lei et al. 2018, Simple recurrent units: gates that look at the state through vectors."""

    maps = "W Wf vf Wr vr Wx"

    def step(self, hold, x, c):
        f = sigmoid(self.Wf(x) + self.vf * c)
        return f * c + (1 - f) * self.W(x)

    def output(self, x, before, after):
        r = sigmoid(self.Wr(x) + self.vr * before[0])
        return r * after[0] + (1 - r) * self.Wx(x)


# -- residual and continuous-time units ---------------------------------------------------------------------------


class ResidualRNN(Cell):
    """Yue, Fu, Liang 2018, Residual recurrent neural networks: K = I."""

    maps = "W U"

    def step(self, hold, x, h):
        return h + tanh(hold(self.U(h)) + self.W(x))


class LeakyRNN(Cell):
    """Jaeger et al. 2007, Echo state networks with leaky-integrator neurons."""

    maps = "W U sa"

    def step(self, hold, x, h):
        a = sigmoid(self.sa)
        return (1 - a) * h + a * tanh(self.W(x) + hold(self.U(h)))


class CTRNN(Cell):
    """Funahashi and Nakamura 1993, Approximation of dynamical systems by continuous time recurrent neural networks."""

    maps = "W U vt"

    def step(self, hold, x, h):
        return h + 0.5 * (-h + hold(self.U(tanh(h))) + self.W(x)) / (1 + F.softplus(self.vt))


class AntisymmetricRNN(Cell):
    """Chang et al. 2019, AntisymmetricRNN: the diffusion -gamma h is elementwise."""

    maps = "W U"

    def inside(self, hold, x, h):
        return self.W(x) + hold(F.linear(h, self.U.weight - self.U.weight.T)) - 0.2 * h

    def step(self, hold, x, h):
        return h + 0.3 * tanh(self.inside(hold, x, h))


class GatedAntisymmetricRNN(AntisymmetricRNN):
    """Chang et al. 2019: a gate that shares the antisymmetric matrix."""

    maps = "W U Wz"

    def step(self, hold, x, h):
        moved = self.inside(hold, x, h)
        return h + 0.3 * sigmoid(moved - self.W(x) + self.Wz(x)) * tanh(moved)


class LipschitzRNN(Cell):
    """Erichson et al. 2021, Lipschitz recurrent neural networks: a matrix outside the tanh, too."""

    maps = "W Ua U"

    def symmetrised(self, m):
        return 0.4 * (m + m.T) + 0.6 * (m - m.T)

    def step(self, hold, x, h):
        linear = hold(F.linear(h, self.symmetrised(self.Ua.weight))) - 0.1 * h
        return h + 0.3 * (linear + tanh(hold(F.linear(h, self.symmetrised(self.U.weight))) - 0.1 * h + self.W(x)))


class LTC(Cell):
    """Hasani et al. 2021, Liquid time-constant networks, the fused solver: the state over 1 + dt (1 / tau + f)."""

    maps = "W U va vt"

    def step(self, hold, x, h):
        f = sigmoid(self.W(x) + hold(self.U(h)))
        return (h + 0.5 * f * self.va) / (1 + 0.5 * (F.softplus(self.vt) + f))


class GRUODE(Cell):
    """De Brouwer et al. 2019, GRU-ODE-Bayes: an Euler step of (1 - z) (n - h)."""

    maps = "W:2 U:2 Wn Un"

    def step(self, hold, x, h):
        z, r = sigmoid(self.W(x) + hold(self.U(h))).chunk(2, -1)
        return h + 0.4 * (1 - z) * (tanh(self.Wn(x) + hold(self.Un(r * h))) - h)


class LEM(Cell):
    """Rusch et al. 2022, Long expressive memory: two states with time steps of their own, joined by matrices."""

    maps = "W:3 U:3 Wy Uy"
    widths = (HIDDEN, HIDDEN)

    def step(self, hold, x, y, z):
        a, b, n = (self.W(x) + hold(self.U(y))).chunk(3, -1)
        a, b = 0.8 * sigmoid(a), 0.8 * sigmoid(b)
        z = (1 - a) * z + a * tanh(n)
        return (1 - b) * y + b * tanh(self.Wy(x) + hold(self.Uy(z))), z


class SNU(Cell):
    """Wozniak et al. 2020, Deep learning incorporating biologically inspired neural dynamics: the soft unit, whose
    reset looks at what it sent."""

    maps = "W U vb"

    def sent(self, s):
        return sigmoid(s + self.vb)

    def step(self, hold, x, s):
        y = self.sent(s)
        return F.elu(self.W(x) + hold(self.U(y)) + 0.8 * s * (1 - y))

    def output(self, x, before, after):
        return self.sent(after[0])


class ALIF(Cell):
    """Bellec et al. 2018, Long short-term memory in networks of spiking neurons: adaptive leaky integrate-and-fire,
    smooth and without reset."""

    maps = "W U vv va"
    widths = (HIDDEN, HIDDEN)

    def sent(self, v, a):
        return sigmoid(4 * (v - a))

    def step(self, hold, x, v, a):
        keep_v, keep_a, z = sigmoid(self.vv), sigmoid(self.va), self.sent(v, a)
        new_v = keep_v * v + (1 - keep_v) * (self.W(x) + hold(self.U(z)))
        return new_v, keep_a * a + (1 - keep_a) * z

    def output(self, x, before, after):
        return self.sent(*after)


# -- long short-term memories -------------------------------------------------------------------------------------


class LSTMCell(Cell):
    """What the LSTMs below vary."""

    maps = "W:4 U:4"
    widths = (HIDDEN, HIDDEN)

    def gates(self, hold, x, h, number=4):
        return (self.W(x) + hold(self.U(h))).chunk(number, -1)

    def gated(self, c, i, f, o, g):
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c

    def step(self, hold, x, h, c):
        return self.gated(c, *self.gates(hold, x, h))


class CoupledLSTM(LSTMCell):
    """Greff et al. 2017, LSTM: a search space odyssey, CIFG: the input gate is 1 - f."""

    maps = "W:3 U:3"

    def step(self, hold, x, h, c):
        f, o, g = self.gates(hold, x, h, 3)
        c = sigmoid(f) * c + (1 - sigmoid(f)) * tanh(g)
        return sigmoid(o) * tanh(c), c


class NoOutputGateLSTM(LSTMCell):
    """Greff et al. 2017, NOG."""

    maps = "W:3 U:3"

    def step(self, hold, x, h, c):
        i, f, g = self.gates(hold, x, h, 3)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return tanh(c), c


class NoForgetGateLSTM(LSTMCell):
    """Greff et al. 2017, NFG, which is Hochreiter and Schmidhuber 1997: K of the cell is I."""

    maps = "W:3 U:3"

    def step(self, hold, x, h, c):
        i, o, g = self.gates(hold, x, h, 3)
        c = c + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c


class NoInputActivationLSTM(LSTMCell):
    """Greff et al. 2017, NIAF."""

    def gated(self, c, i, f, o, g):
        c = sigmoid(f) * c + sigmoid(i) * g
        return sigmoid(o) * tanh(c), c


class NoOutputActivationLSTM(LSTMCell):
    """Greff et al. 2017, NOAF."""

    def gated(self, c, i, f, o, g):
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return sigmoid(o) * c, c


class ForgetPeepholeLSTM(LSTMCell):
    """Gers and Schmidhuber 2000, Recurrent nets that time and count: a peephole, here of the forget gate only."""

    maps = "W:4 U:4 vp"

    def gated(self, c, i, f, o, g):
        return super().gated(c, i, f + self.vp * c, o, g)


class ProjectedLSTM(LSTMCell):
    """Sak, Senior, Beaufays 2014, Long short-term memory architectures for large scale acoustic modeling: h is narrow,
    and behind a matrix."""

    maps = "W:4 V:4 P"
    widths = (INPUT, HIDDEN)

    def step(self, hold, x, h, c):
        h, c = self.gated(c, *(self.W(x) + hold(self.V(h))).chunk(4, -1))
        return hold(self.P(h)), c


class MultiplicativeLSTM(LSTMCell):
    """Krause et al. 2016, Multiplicative LSTM for sequence modelling: gates of (W x) * (U h)."""

    maps = "W:4 U:4 Wm Um"

    def step(self, hold, x, h, c):
        return super().step(hold, x, self.Wm(x) * hold(self.Um(h)), c)


class JANET(Cell):
    """Van der Westhuizen and Lasenby 2018, The unreasonable effectiveness of the forget gate."""

    maps = "W:2 U:2"

    def step(self, hold, x, c):
        s, n = (self.W(x) + hold(self.U(c))).chunk(2, -1)
        return sigmoid(s) * c + (1 - sigmoid(s - 1.0)) * tanh(n)


class RAN(LSTMCell):
    """Lee, Levy, Zettlemoyer 2017, Recurrent additive networks."""

    maps = "W:2 U:2 Wn"

    def step(self, hold, x, h, c):
        i, f = self.gates(hold, x, h, 2)
        c = sigmoid(i) * self.Wn(x) + sigmoid(f) * c
        return tanh(c), c


class ZoneoutLSTM(LSTMCell):
    """Krueger et al. 2017, Zoneout, as it runs in evaluation: both states keep a part of what they were."""

    def step(self, hold, x, h, c):
        new_h, new_c = super().step(hold, x, h, c)
        return 0.2 * h + 0.8 * new_h, 0.3 * c + 0.7 * new_c


class NormalizedLSTM(LSTMCell):
    """Ba, Kiros, Hinton 2016, Layer normalization: from c to h by a norm, whose mean and deviation are held."""

    maps = "W:4 U:4 vw vb"

    def step(self, hold, x, h, c):
        i, f, o, g = self.gates(hold, x, h)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        centred = c - hold(c.mean(-1, keepdim=True))
        norm = centred * hold(torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-3))
        return sigmoid(o) * tanh(norm * self.vw + self.vb), c


class TimeLSTM(LSTMCell):
    """Baytas et al. 2017, Patient subtyping via time-aware LSTM networks: the short-term part of c is discounted."""

    maps = "W:4 U:4 Ud Wd"

    def step(self, hold, x, h, c):
        short = tanh(hold(self.Ud(c)))
        return super().step(hold, x, h, c - short + short / torch.log(torch.e + F.softplus(self.Wd(x))))


class NestedLSTM(LSTMCell):
    """Moniz and Krueger 2017, Nested LSTMs: the cell of an LSTM is the hidden state of another."""

    maps = "W:4 U:4 Ui:4 Uo:4 vo:4"
    widths = (HIDDEN, HIDDEN, HIDDEN)

    def step(self, hold, x, h, c, d):
        i, f, o, g = self.gates(hold, x, h)
        inner = hold(self.Ui(sigmoid(i) * tanh(g))) + hold(self.Uo(sigmoid(f) * c)) + self.vo
        c, d = self.gated(d, *inner.chunk(4, -1))
        return sigmoid(o) * tanh(c), c, d


class OrderedNeuronsLSTM(LSTMCell):
    """Shen et al. 2019, Ordered neurons: master gates by a cumulative softmax."""

    maps = "W:6 U:6"

    def step(self, hold, x, h, c):
        i, f, o, g, mf, mi = self.gates(hold, x, h, 6)
        mf, mi = torch.cumsum(torch.softmax(mf, -1), -1), 1 - torch.cumsum(torch.softmax(mi, -1), -1)
        both = mf * mi
        f, i = sigmoid(f) * both + (mf - both), sigmoid(i) * both + (mi - both)
        c = f * c + i * tanh(g)
        return sigmoid(o) * tanh(c), c


class ScalarLSTM(LSTMCell):
    """Beck et al. 2024, xLSTM, the sLSTM: exponential gates, a normaliser n and a stabiliser m."""

    widths = (HIDDEN, HIDDEN, HIDDEN, HIDDEN)
    lowest = 0.3

    def step(self, hold, x, h, c, n, m):
        i, f, o, z = self.gates(hold, x, h)
        f = F.logsigmoid(f)
        most = torch.maximum(f + m, i)
        i, f = torch.exp(i - most), torch.exp(f + m - most)
        c, n = f * c + i * tanh(z), f * n + i
        return sigmoid(o) * c / n, c, n, most


class MomentumLSTM(LSTMCell):
    """Nguyen et al. 2020, MomentumRNN: an LSTM driven by a momentum of its input, which is a chain of its own."""

    maps = "W:4 U:4 sm"
    widths = (HIDDEN, HIDDEN, 4 * HIDDEN)

    def momentum(self, x, v):
        return sigmoid(self.sm) * v + 0.6 * self.W(x)

    def driven(self, hold, v, h, c):
        return self.gated(c, *(v + hold(self.U(h))).chunk(4, -1))

    def step(self, hold, x, h, c, v):
        v = self.momentum(x, v)
        return *self.driven(hold, v, h, c), v

    def states(self, run_chain, x, state):
        momenta = [state[-1]]
        for x_t in x.unbind(0):
            momenta.append(self.momentum(x_t, momenta[-1]))
        links = [Link(lambda s, side, hold: (self.driven(hold, *side, *s), ()), (v,)) for v in momenta[1:]]
        return [(*s, v) for s, v in zip(run_chain(links, state[:2]).states, momenta, strict=True)]


# -- linear in the state: exact -----------------------------------------------------------------------------------


class QRNN(Cell):
    """Bradbury et al. 2017, Quasi-recurrent neural networks: fo-pooling behind a convolution two steps wide."""

    maps = "W:3 V:3"
    widths = (HIDDEN, INPUT)
    exact = LINEAR

    def step(self, hold, x, c, last):
        n, f, _ = (self.W(x) + self.V(last)).chunk(3, -1)
        return sigmoid(f) * c + (1 - sigmoid(f)) * tanh(n), x

    def output(self, x, before, after):
        return sigmoid((self.W(x) + self.V(before[1])).chunk(3, -1)[2]) * after[0]


class MinLSTM(Cell):
    """Feng et al. 2024, Were RNNs all we needed?"""

    maps = "W:3"
    exact = LINEAR

    def step(self, hold, x, h):
        f, i, n = self.W(x).chunk(3, -1)
        f, i = sigmoid(f), sigmoid(i)
        return f / (f + i) * h + i / (f + i) * n


class RWKV(Cell):
    """Peng et al. 2023, RWKV: a decaying numerator and denominator, and a bonus for the present."""

    maps = "Wk Wv Wr vw vu"
    widths = (HIDDEN, HIDDEN)
    lowest = 0.1
    exact = LINEAR

    def step(self, hold, x, numerator, denominator):
        decay, k = torch.exp(-torch.exp(self.vw)), torch.exp(self.Wk(x))
        return decay * numerator + k * self.Wv(x), decay * denominator + k

    def output(self, x, before, after):
        now = torch.exp(self.vu + self.Wk(x))
        return sigmoid(self.Wr(x)) * (before[0] + now * self.Wv(x)) / (before[1] + now)


class GatedDelta(Cell):
    """Yang, Kautz, Hatamizadeh 2024, Gated delta networks, with a state of numbers instead of matrices."""

    maps = "Wa Wb Wk Wv"
    exact = LINEAR

    def step(self, hold, x, h):
        alpha, beta, k = sigmoid(self.Wa(x)), sigmoid(self.Wb(x)), tanh(self.Wk(x))
        return alpha * (h - beta * k * (k * h)) + beta * k * self.Wv(x)


class MovingAverage(Cell):
    """Ma et al. 2023, Mega: a damped exponential moving average, here of tanh(W x)."""

    maps = "W va vd"
    exact = LINEAR

    def step(self, hold, x, h):
        a, d = sigmoid(self.va), sigmoid(self.vd)
        return a * tanh(self.W(x)) + (1 - a * d) * h


class RGLRU(Cell):
    """De et al. 2024, Griffin: the real-gated linear recurrent unit."""

    maps = "Wa Wi W vl"
    exact = LINEAR

    def step(self, hold, x, h):
        log_a = -F.softplus(self.vl) * sigmoid(self.Wa(x))
        return torch.exp(log_a) * h + torch.sqrt(1 - torch.exp(2 * log_a)) * (sigmoid(self.Wi(x)) * self.W(x))


# -- declined, and so exact ---------------------------------------------------------------------------------------


class SCRN(Cell):
    """Mikolov et al. 2015, Learning longer memory in recurrent neural networks: a slow context beside an RNN."""

    maps = "W Wb U Uc"
    widths = (HIDDEN, HIDDEN)
    exact = NO_PATH

    def step(self, hold, x, h, s):
        s = 0.05 * self.Wb(x) + 0.95 * s
        return sigmoid(self.Uc(s) + self.W(x) + self.U(h)), s


class MomentumRNN(Cell):
    """Nguyen et al. 2020, MomentumRNN."""

    maps = "W U sm"
    widths = (HIDDEN, HIDDEN)
    exact = NO_PATH

    def step(self, hold, x, h, v):
        v = sigmoid(self.sm) * v + 0.6 * self.W(x)
        return tanh(self.U(h) + v), v


class CoRNN(Cell):
    """Rusch and Mishra 2021, Coupled oscillatory recurrent neural network: y and its speed z."""

    maps = "W Uy Uz"
    widths = (HIDDEN, HIDDEN)
    exact = CIRCLE

    def step(self, hold, x, y, z):
        z = z + 0.3 * (tanh(self.W(x) + self.Uy(y) + self.Uz(z)) - 0.9 * y - 0.7 * z)
        return y + 0.3 * z, z


class UnICORNN(Cell):
    """Rusch and Mishra 2021, UnICORNN: oscillators that see one another in the next layer only."""

    maps = "W vw vc"
    widths = (HIDDEN, HIDDEN)
    exact = CIRCLE

    def step(self, hold, x, y, z):
        dt = 0.5 * sigmoid(self.vc)
        z = z - dt * (tanh(self.vw * y + self.W(x)) + 0.9 * y)
        return y + dt * z, z


class IndyLSTM(Cell):
    """Gonnet and Deselaers 2020, IndyLSTMs: h feeds c and c feeds h through vectors."""

    maps = "W:4 vi vf vo vg"
    widths = (HIDDEN, HIDDEN)
    exact = CIRCLE

    def step(self, hold, x, h, c):
        i, f, o, g = self.W(x).chunk(4, -1)
        c = sigmoid(f + self.vf * h) * c + sigmoid(i + self.vi * h) * tanh(g + self.vg * h)
        return sigmoid(o + self.vo * h) * tanh(c), c


@dataclass(frozen=True)
class PublishedCase:
    """As ``cells.CellCase``: what to build, and the oracle's program."""

    make: type[Cell]

    @property
    def name(self) -> str:
        return self.make.__name__

    def build(self, length: int, seed: int = 0) -> tuple[Cell, Tensor, Any]:
        torch.manual_seed(seed)
        cell = self.make().double()
        x = torch.randn(length, BATCH, INPUT, dtype=torch.float64, requires_grad=True)
        state = tuple(torch.empty(BATCH, n, dtype=torch.float64).uniform_(cell.lowest, 1.0) for n in cell.widths)
        state = tuple(s.requires_grad_() for s in state)
        return cell, x, state if len(state) > 1 else state[0]

    def program(self, cell: Cell) -> Program:
        """``(x, *state) -> (outputs, last state)``"""

        def forward(run_chain: Any, x: Tensor, *state: Tensor) -> Any:
            states = cell.states(run_chain, x, state)
            outputs = [cell.output(x[t], states[t], states[t + 1]) for t in range(x.shape[0])]
            return torch.stack(outputs), states[-1]

        return Program(dict(cell.named_parameters()), forward)


PUBLISHED = [
    PublishedCase(make)
    for make in (
        *(MGU, MGU2, ResetBeforeGRU, GRU1, GRU2, GRU3, UGRNN, IntersectionRNN, MUT1, MUT3, STAR, CFN, DeltaRNN),
        *(GORU, FastRNN, FastGRNN, HighwayRNN, DeepHighwayRNN, GRUD, NBRC, BRC, IndGRU, SRU),
        *(ResidualRNN, LeakyRNN, CTRNN, AntisymmetricRNN, GatedAntisymmetricRNN, LipschitzRNN, LTC, GRUODE, LEM, SNU),
        *(ALIF, CoupledLSTM, NoOutputGateLSTM, NoForgetGateLSTM, NoInputActivationLSTM, NoOutputActivationLSTM),
        *(ForgetPeepholeLSTM, ProjectedLSTM, MultiplicativeLSTM, JANET, RAN, ZoneoutLSTM, NormalizedLSTM, TimeLSTM),
        *(NestedLSTM, OrderedNeuronsLSTM, ScalarLSTM, MomentumLSTM),
        *(QRNN, MinLSTM, RWKV, GatedDelta, MovingAverage, RGLRU),
        *(SCRN, MomentumRNN, CoRNN, UnICORNN, IndyLSTM),
    )
]
