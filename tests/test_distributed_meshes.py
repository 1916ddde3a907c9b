"""Claims about pipelines with data parallelism, with many ranks, and with other people's models. All tests are slow,
because they start many processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pipelines
import pytest
import torch
import torch.distributed as dist
from pipelines import Case, PostLN, PreLN, ReLU, oracle
from torch.distributed import checkpoint
from torch.func import functional_call, vjp

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


MESHES = {
    "ddp_preln": Case(((PreLN,) * 2,) * 3, 0, 0.2),
    "ddp_relu": Case(((ReLU,) * 2,) * 3, 0, 0.2),
    "fsdp_preln": Case(((PreLN,) * 2,) * 3, 0, 0.2),
    "fsdp_relu": Case(((ReLU,) * 2,) * 3, 0, 0.2),
}


def test_data_parallelism_over_the_other_dimension(tmp_path):
    """Two copies of three stages. Each parameter's gradient is the mean over the copies."""
    found = pipelines.run(6, MESHES, tmp_path, worker=pipelines.mesh_worker)
    for name, case in MESHES.items():
        one, other = oracle(case, 0)[0], oracle(case, 1)[0]
        for rank, got in enumerate(found[name]):
            for key, gradient in got["gradients"].items():
                mean = (one[rank % 3][key] + other[rank % 3][key]) / 2
                torch.testing.assert_close(gradient, mean, rtol=1e-10, atol=1e-12)


def by_inductor(stage):
    return torch.compile(stage, backend="inductor")


def by_highway(stage):
    return torch.compile(stage, backend="highway", options={"iterations": "exact"})


COMPILED = {
    "inductor": Case(((PostLN,) * 2,) * 4, 1, 0.2, wrap=by_inductor),
    "highway": Case(((PostLN,) * 2,) * 4, 1, 0.2, wrap=by_highway),
}


def test_compiled_stages(tmp_path):
    found = pipelines.run(4, COMPILED, tmp_path, 200.0)
    for name, case in COMPILED.items():
        for got, want in zip(found[name], oracle(case)[0], strict=True):
            for key, gradient in want.items():
                torch.testing.assert_close(got["gradients"][key], gradient, rtol=1e-10, atol=1e-12)


EIGHT = {f"{kind.__name__}_k{k}": Case(((kind,),) * 8, k, 0.2) for kind in (PreLN, PostLN, ReLU) for k in (0, 2, 6)}


def test_eight_ranks(tmp_path):
    found = pipelines.run(8, EIGHT, tmp_path)
    for name, case in EIGHT.items():
        for got, want in zip(found[name], oracle(case)[0], strict=True):
            for key, gradient in want.items():
                torch.testing.assert_close(got["gradients"][key], gradient, rtol=1e-10, atol=1e-12)


# -- a model of Hugging Face, split by pipeline() ----------------------------------------------------------------------

LAYERS = 4


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=23, n_positions=16, n_embd=16, n_layer=LAYERS, n_head=2, use_cache=False, bos_token_id=None,
        eos_token_id=None, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt2 = model

        def forward(self, x):
            return self.gpt2(x).logits

    return Logits()


def words():
    torch.manual_seed(1)
    return torch.randint(0, 23, (4, 8)), torch.randint(0, 23, (4, 8))


def next_words(y, target):
    return torch.nn.functional.cross_entropy(y.flatten(0, 1), target.flatten())


def gpt2_worker(rank, size, folder, ks, seconds):
    from torch.distributed.pipelining import SplitPoint, pipeline

    from hwbp_compiler.distributed import ScheduleHighway

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # which also decides which random numbers are drawn
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    x, target = words()
    places = {f"gpt2.transformer.h.{i}": SplitPoint.BEGINNING for i in range(1, LAYERS)}
    pipe = pipeline(gpt2(), mb_args=(x[:2],), split_spec=places)
    for k in ks:
        schedule = ScheduleHighway(
            pipe.build_stage(rank, torch.device("cpu")), 2, loss_fn=next_words, iterations=k, damping=0.2
        )
        module = pipe.get_stage_module(rank)
        module.zero_grad()
        schedule.step(*([x] if rank == 0 else []), target=target if rank == size - 1 else None)
        gradients = {n: p.grad.clone() for n, p in module.named_parameters()}
        torch.save({"gradients": gradients, "text": schedule.explain()}, f"{folder}/{k}-{rank}.pt")
    for p in module.parameters():
        p.data.mul_(2.0)
    checkpoint.save(module.state_dict(), checkpoint_id=f"{folder}/checkpoint")
    dist.destroy_process_group()


def test_gpt2_of_hugging_face_split_by_pipeline(tmp_path):
    """Each block has K = 1 and two links: P = 0.64 under damping 0.2."""
    ks = {0: None, 1: None, 2: None}
    found = pipelines.run(LAYERS, ks, tmp_path, 120.0, gpt2_worker)
    model, (x, target) = gpt2(), words()
    blocks = model.gpt2.transformer.h
    states: list[torch.Tensor] = []
    handles = [
        b.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
        for b in blocks
    ]
    head = torch.autograd.grad(next_words(model(x), target), states[LAYERS - 2])[0]
    for handle in handles:
        handle.remove()

    def block(i, h, weights=None):
        out = functional_call(blocks[i], weights or {}, (h,))
        return out[0] if isinstance(out, tuple) else out

    def through(i, e):
        return vjp(lambda h: block(i, h), states[i - 1].detach())[1](e)[0]

    for k in ks:
        ends = {2: head, 1: 0.64 * head, 0: 0.64 * 0.64 * head}
        for _ in range(k):
            v = {i: through(i, ends[i]) - 0.64 * ends[i] for i in (1, 2)}
            ends[1] = v[2] + 0.64 * head
            ends[0] = v[1] + 0.64 * ends[1]
        for i in (1, 2):
            weights = {n: p.detach() for n, p in blocks[i].named_parameters()}
            want = vjp(lambda w, i=i: block(i, states[i - 1].detach(), w), weights)[1](ends[i])[0]
            got = found[k][i]["gradients"]
            assert len(got) == len(want)
            for name, gradient in want.items():
                torch.testing.assert_close(
                    got[f"gpt2.transformer.h.{i}.{name}"], gradient, rtol=1e-10, atol=1e-12, msg=f"{k} {i} {name}"
                )
    assert "stage 1 (rank 1, GraphModule): a segment of 2 links, P = 1" in found[0][0]["text"]
    # A checkpoint of all stages is a checkpoint of the model, with the model's own names.
    state = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    checkpoint.load(state, checkpoint_id=str(tmp_path / "checkpoint"), no_dist=True)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state[name], 2 * parameter.detach())


@pytest.mark.parametrize("name", ["layer_parallel", "time_parallel"])
def test_the_example_trains(name):
    script = Path(__file__).parents[1] / "examples" / f"{name}.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", str(script)]
    done = subprocess.run([*command, "--steps", "30"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [
        float(line.split("loss ")[1].split(",")[0])
        for line in done.stdout.splitlines()
        if "loss " in line and "step" in line
    ]
    assert len(losses) == 4 and losses[-1] < losses[0]
