"""Reinforcement learning: PPO with a GRU as policy, in a game that takes memory.

    python examples/recurrent_ppo.py                      # the default options of the compiler
    python examples/recurrent_ppo.py --method exact       # the same with exact backprop
    python examples/recurrent_ppo.py --longest 128        # longer games: a longer chain

A cue is shown at the first step. Noise follows for a random number of steps, then a sign, and the answer must be the
cue: +1 if it is, -1 if not. All games of a rollout are played at once. They end at different steps, and what a policy
does after the end of its game is masked out of the loss, so every rollout has the same shape and one compilation serves
all. ``--batch`` is games in a rollout, ``--epochs`` is rollouts, and every rollout trains ``--passes`` steps.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from data import generator
from torch import Tensor, nn
from training import Task, main, parser, positive

OBSERVED, ACTIONS = 4, 2  # the cue (one of two), the sign, noise
DISCOUNT, TRACE, CLIP = 0.99, 0.95, 0.2


class Recall:
    """``games`` games at once, of ``longest`` steps at most."""

    def __init__(self, games: int, longest: int, rng: torch.Generator) -> None:
        self.rng, self.time = rng, 0
        self.cue = torch.randint(ACTIONS, (games,), generator=rng)
        self.end = torch.randint(longest // 2, longest, (games,), generator=rng)

    def observe(self) -> Tensor:
        """[games, OBSERVED]"""
        cue = F.one_hot(self.cue, ACTIONS) * (self.time == 0)
        noise = torch.randn(len(self.cue), 1, generator=self.rng)
        return torch.cat([cue, (self.end == self.time).unsqueeze(1), noise], 1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Reward and whether the game is over, both [games]."""
        done = self.end == self.time
        reward = torch.where(action == self.cue, 1.0, -1.0) * done
        self.time += 1
        return reward, done


class Policy(nn.Module):
    """Observations [steps, games, OBSERVED] -> logits and value [steps, games, ACTIONS + 1]

    The rollout it learns from is a buffer, so that it is in the checkpoint: an interrupted run goes on with it."""

    def __init__(self, hidden: int, longest: int, games: int) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(OBSERVED, hidden), nn.Linear(hidden, ACTIONS + 1)
        # At first, units keep what they hold for one step up to a whole game ("chrono" initialisation).
        with torch.no_grad():
            self.gru.bias_ih_l0[hidden : 2 * hidden] = 0.0
            self.gru.bias_hh_l0[hidden : 2 * hidden] = torch.empty(hidden).uniform_(1, longest).log()
        self.register_buffer("rollout", torch.zeros(longest, games, OBSERVED + 5))

    def forward(self, x):
        return self.head(self.gru(x)[0])

    def act(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One step: logits [games, ACTIONS], value [games], and the next state."""
        out, state = self.gru(x.unsqueeze(0), state)
        logits, value = self.head(out[0]).split([ACTIONS, 1], 1)
        return logits, value.squeeze(1), state


@torch.no_grad()
def play(policy: Policy, games: int, longest: int, rng: torch.Generator) -> Tensor:
    """A rollout [longest, games, OBSERVED + 5]: observation, action, its log-probability, advantage, return, and 1
    until the game is over."""
    device = policy.head.weight.device
    env, state, running, steps = Recall(games, longest, rng), None, torch.ones(games, dtype=torch.bool), []
    for _ in range(longest):
        seen = env.observe()
        logits, value, state = policy.act(seen.to(device), state)
        chances = logits.softmax(1).cpu()
        action = torch.multinomial(chances, 1, generator=rng).squeeze(1)
        reward, done = env.step(action)
        log = chances.gather(1, action[:, None]).squeeze(1).log()
        steps.append((seen, action, log, value.cpu(), reward, done, running))
        running = running & ~done
    advantage, after, rows = torch.zeros(games), torch.zeros(games), []
    for seen, action, log, value, reward, done, running in reversed(steps):  # generalised advantage estimation
        goes_on = (~done).float()
        surprise = reward + DISCOUNT * goes_on * after - value
        advantage, after = surprise + DISCOUNT * TRACE * goes_on * advantage, value
        rows.append(torch.cat([seen, torch.stack([action, log, advantage, advantage + value, running], 1)], 1))
    return torch.stack(rows[::-1])


def mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def ppo_loss(output: Tensor, target: Tensor) -> Tensor:
    action, old, advantage, returned, running = target.unbind(-1)
    logits, value = output.split([ACTIONS, 1], -1)
    logs = logits.log_softmax(-1)
    ratio = (logs.gather(-1, action.long().unsqueeze(-1)).squeeze(-1) - old).exp()
    centred = advantage - mean(advantage, running)
    scaled = centred / (mean(centred**2, running).sqrt() + 1e-6)
    gain = torch.minimum(ratio * scaled, ratio.clamp(1 - CLIP, 1 + CLIP) * scaled)
    entropy = -(logs.exp() * logs).sum(-1)
    return mean((value.squeeze(-1) - returned) ** 2 / 2 - gain - 0.01 * entropy, running)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    p = parser(__doc__, method="auto", epochs=100, batch=32, lr=3e-3)
    p.add_argument("--hidden", type=int, default=64)
    p.add_argument("--longest", type=positive, default=64, help="steps of a game, at most")
    p.add_argument("--passes", type=positive, default=4, help="training steps on one rollout")
    args = p.parse_args(words)
    if args.longest < 2:
        p.error("argument --longest: 1, but at least 2 is needed: one for the cue and one for the answer")
    return args


def task(args: argparse.Namespace) -> Task:
    torch.manual_seed(args.seed)
    policy = Policy(args.hidden, args.longest, args.batch)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        if (step - 1) % args.passes == 0:
            policy.rollout.copy_(play(policy, args.batch, args.longest, generator(args.seed, step)))
        seen, target = policy.rollout.split([OBSERVED, 5], -1)
        return seen.contiguous(), target.contiguous()

    def success(model: nn.Module) -> dict[str, float]:
        """The share of right answers, in games that are the same each time."""
        played = play(policy, 256, args.longest, generator(args.seed, -1))
        # The return at a game's last step is its reward: nothing comes after it.
        last = played[..., -1].sum(0).long() - 1
        return {"success": (played[last, torch.arange(256), -2] > 0).float().mean().item()}

    return Task(policy, batch, ppo_loss, success, args.passes)


if __name__ == "__main__":
    args = arguments()
    main(task(args), args)
