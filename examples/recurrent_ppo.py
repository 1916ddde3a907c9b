"""Reinforcement learning: PPO with a GRU as policy, in a game that needs memory.

    python examples/recurrent_ppo.py                      # the default options of the compiler
    python examples/recurrent_ppo.py --method exact       # the same with exact backprop
    python examples/recurrent_ppo.py --longest 128        # longer games: a longer chain

The first step of a game shows a cue. Then comes noise for a random number of steps, and then a sign. The policy must
answer with the cue: the reward is +1 for the right answer and -1 for a wrong one. All games of a rollout are played at
once. They end at different steps, and the loss ignores the steps after the end of a game. So every rollout has the same
shape, and the model is compiled once. ``--batch`` is the number of games in a rollout, ``--epochs`` the number of
rollouts, and ``--passes`` the number of training steps on each rollout.
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
    """``games`` games played at once, each of at most ``longest`` steps."""

    def __init__(self, games: int, longest: int, rng: torch.Generator) -> None:
        self.rng, self.time = rng, 0
        self.cue = torch.randint(ACTIONS, (games,), generator=rng)
        self.end = torch.randint(longest // 2, longest, (games,), generator=rng)

    def observe(self) -> Tensor:
        """What the policy sees in this step: [games, OBSERVED]."""
        cue = F.one_hot(self.cue, ACTIONS) * (self.time == 0)
        noise = torch.randn(len(self.cue), 1, generator=self.rng)
        return torch.cat([cue, (self.end == self.time).unsqueeze(1), noise], 1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """The reward, and whether the game is over; both [games]."""
        done = self.end == self.time
        reward = torch.where(action == self.cue, 1.0, -1.0) * done
        self.time += 1
        return reward, done


class Policy(nn.Module):
    """Maps observations [steps, games, OBSERVED] to logits and value, [steps, games, ACTIONS + 1].

    The current rollout is a buffer and so part of the checkpoint: an interrupted run continues with it."""

    def __init__(self, hidden: int, longest: int, games: int) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(OBSERVED, hidden), nn.Linear(hidden, ACTIONS + 1)
        # "Chrono" initialisation: at first the units remember for between one step and a whole game.
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
    """Play a rollout: [longest, games, OBSERVED + 5]. The columns are the observation, the action, its log-probability,
    the advantage, the return, and 1 until the game is over, then 0."""
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
    p.add_argument("--longest", type=positive, default=64, help="most steps of a game")
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
        """The share of right answers. The games are the same in every call."""
        played = play(policy, 256, args.longest, generator(args.seed, -1))
        # The return at the last step of a game is the reward of that step.
        last = played[..., -1].sum(0).long() - 1
        return {"success": (played[last, torch.arange(256), -2] > 0).float().mean().item()}

    return Task(policy, batch, ppo_loss, success, args.passes)


if __name__ == "__main__":
    args = arguments()
    main(task(args), args)
