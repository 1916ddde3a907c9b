"""What people combine ``torch.compile`` with: the gradients are w^k's, or the combination is refused with a clear
message.

``tests/reliability.py`` builds docs/reliability.md from the marker ``combination(name, status, note)``.
"""

from __future__ import annotations

import copy
import importlib
import io
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from small import Residual
from torch import nn
from torch.utils.checkpoint import checkpoint

import hwbp_compiler
from hwbp_compiler import backend
from hwbp_compiler.testing import Link, Program, assert_gradients_close, reference_gradients

combination = pytest.mark.combination
OPTIONS = {"iterations": 1, "rewrite": "always", "strict": True}


def make(blocks=5, kind=Residual) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(kind() for _ in range(blocks)))


def inputs(*shape) -> torch.Tensor:
    return torch.randn(*(shape or (3, 4)), generator=torch.Generator().manual_seed(1))


def loss_of(output):
    return output.square().sum()


def expected(model, x, iterations=1) -> dict[str, torch.Tensor]:
    """w^k by the oracle, in float64."""
    wide = copy.deepcopy(model).double()

    def link(block):
        return Link(lambda state, side, hold: ((state[0] + hold(block.block(state[0])),), ()))

    def forward(run, x):
        return run([link(block) for block in wide], (x,)).states[-1][0]

    _, found = reference_gradients(Program(dict(wide.named_parameters()), forward), (x.double(),), loss_of, iterations)
    return found


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def compiled(model, **kwargs):
    options = {**OPTIONS, **kwargs.pop("options", {})} if "mode" not in kwargs else None
    return torch.compile(model, backend="highway", options=options, **kwargs)


def check(model, x, step=None, tolerance=1e-4, **kwargs) -> None:
    """Call ``step`` (the compiled model) once. Check that ``.grad`` is that of w^1 and that a chain was rewritten."""
    loss_of((step or compiled(model, **kwargs))(x)).backward()
    assert hwbp_compiler.counters()["chains_rewritten"] >= 1
    assert_gradients_close(gradients(model), expected(model, x), tolerance, noise=1e-6)


# -- precision, checkpoints, and gradients in several steps -------------------------------------------------------


@combination("`torch.autocast` in bfloat16", "supported", "the residual stream stays float32")
def test_autocast_bfloat16():
    model, x = make(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        check(model, x, tolerance=5e-2)


@combination("`torch.autocast` in float16 with `GradScaler`", "supported", "")
def test_autocast_float16_with_a_gradient_scaler():
    model, x = make(), inputs()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = compiled(model)
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(step(x))
    wanted = expected(model, x)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert_gradients_close(gradients(model), wanted, 2e-2, noise=1e-4)
    scaler.step(optimizer)
    scaler.update()


@combination("`torch.utils.checkpoint`", "supported", "a checkpointed block is a link like any other")
def test_activation_checkpoints():
    class Checkpointed(Residual):
        def forward(self, x):
            return x + checkpoint(self.block, x, use_reentrant=False)

    check(make(kind=Checkpointed), inputs())


@combination("gradient accumulation", "supported", "")
def test_gradient_accumulation():
    model, x = make(), inputs()
    step = compiled(model)
    for _ in range(2):
        loss_of(step(x)).backward()
    assert_gradients_close(gradients(model), {k: 2 * g for k, g in expected(model, x).items()}, 1e-4, 1e-6)


@combination(
    "`retain_graph=True`", "supported", "as under any backend, with `torch._functorch.config.donated_buffer = False`"
)
def test_retain_graph():
    model, x = make(), inputs()
    with torch._functorch.config.patch(donated_buffer=False):
        loss = loss_of(compiled(model)(x))
        loss.backward(retain_graph=True)
        loss.backward()
    assert_gradients_close(gradients(model), {k: 2 * g for k, g in expected(model, x).items()}, 1e-4, 1e-6)


# -- parameters, hooks and buffers --------------------------------------------------------------------------------


@combination("frozen parameters", "supported", "")
def test_frozen_parameters():
    model = make()
    model[1].requires_grad_(False)
    check(model, inputs())
    assert model[1].linear.weight.grad is None


@combination("shared parameters", "supported", "")
def test_shared_parameters():
    model = make()
    model[3].linear.weight = model[1].linear.weight
    check(model, inputs())


@combination("`torch.func.functional_call`", "supported", "")
def test_parameters_of_a_functional_call():
    model, x = make(), inputs()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    step = compiled(lambda parameters, x: torch.func.functional_call(model, parameters, (x,)))
    loss_of(step(parameters, x)).backward()
    assert_gradients_close({k: p.grad for k, p in parameters.items()}, expected(model, x), 1e-4, 1e-6)


@combination("hooks on modules, parameters and the compiled model's output", "supported", "")
def test_hooks():
    model, x = make(), inputs()
    seen = []
    model[2].register_forward_hook(lambda module, args, output: output * 1.0)
    model[0].linear.weight.register_hook(lambda g: seen.append("gradient") or 2 * g)
    model[1].linear.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    output = compiled(model)(x)
    output.register_hook(lambda g: seen.append("output"))
    loss_of(output).backward()
    wanted = expected(model, x)
    wanted["0.linear.weight"] *= 2
    assert_gradients_close(gradients(model), wanted, 1e-4, 1e-6)
    assert sorted(seen) == ["accumulated", "gradient", "output"]


@combination(
    "hooks on intermediate states (`tensor.register_hook`)",
    "supported",
    "a hook made of elementwise operators is part of its link; a hook with side effects ends the chain",
)
@pytest.mark.parametrize("changes", [True, False])
def test_hooks_on_intermediate_states(changes):
    seen = []

    class Hooked(nn.Sequential):
        def forward(self, x):
            for i, block in enumerate(self):
                x = block(x)
                if i == 2:
                    x.register_hook((lambda g: 2 * g) if changes else (lambda g: seen.append(g.clone())))
            return x

    model, x = Hooked(*make(6)), inputs()
    wide = copy.deepcopy(model).double()

    def link(i, block):
        def step(state, side, hold):
            after = state[0] + hold(block.block(state[0]))
            return (2 * after - after.detach() if i == 2 and changes else after,), ()  # the hook's gradient

        return Link(step)

    def forward(run, x):
        return run([link(*pair) for pair in enumerate(wide)], (x,)).states[-1][0]

    program = Program(dict(wide.named_parameters()), forward)
    _, wanted = reference_gradients(program, (x.double(),), loss_of, 1 if changes else "exact")
    loss_of(compiled(model)(x)).backward()
    assert_gradients_close(gradients(model), wanted, 1e-4, 1e-6)
    assert len(seen) == (0 if changes else 1)
    assert hwbp_compiler.counters()["chains_rewritten"] == (1 if changes else 0)


@combination(
    "full backward hooks (`register_full_backward_hook`)",
    "declined",
    "the chain ends at the module. As under any backend, Dynamo does not call such hooks on torch's own modules "
    "(`nn.Linear`) or on the compiled module",
)
@pytest.mark.parametrize("changes", [True, False])
def test_full_backward_hooks(changes):
    model, x = make(6), inputs()
    seen = []

    def hook(module, into, out):
        seen.append(out[0].clone())
        return tuple(g if g is None else 2 * g for g in into) if changes else None

    model[2].register_full_backward_hook(hook)
    loss_of(model(x)).backward()
    wanted = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    loss_of(compiled(model)(x)).backward()
    assert_gradients_close(gradients(model), wanted, 1e-4, 1e-6)
    assert len(seen) == 2 and hwbp_compiler.counters()["chains_rewritten"] == 0
    torch.testing.assert_close(seen[0], seen[1])


@combination("in-place updates (`z += x`)", "supported", "")
def test_in_place_updates():
    class InPlace(Residual):
        def forward(self, x):
            z = 1.0 * self.block(x)
            z += x
            return z

    model, x = make(kind=InPlace), inputs()
    check(model, x)


@combination("buffers written to in the forward pass", "supported", "")
def test_buffers_mutated_in_forward():
    class Counting(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return x + self.block(x)

    model, x = make(kind=Counting), inputs()
    eager = copy.deepcopy(model)
    eager(x)
    check(model, x)
    for got, wanted in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(got, wanted)


@combination(
    "buffers that are changed and used in one forward pass",
    "supported",
    "gradients are eager mode's or w^k. (Those of plain Inductor can be wrong in torch 2.11 to 2.14: it may compute "
    "the new value a second time, from the buffer that already holds it)",
)
@pytest.mark.parametrize("iterations", [1, "exact"])
@pytest.mark.parametrize("many", [False, True], ids=["one for each block", "one for all"])
def test_buffers_changed_and_used_in_forward(iterations, many):
    """In training step n the multiplier of a block is n."""
    model, x = make(), inputs()

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = model
            self.register_buffer("counts", torch.zeros(len(model)))
            for i in range(len(model)):
                self.register_buffer(f"count{i}", torch.zeros(()))

        def forward(self, x):
            counts = self.counts.add_(1)
            for i, block in enumerate(self.blocks):
                count = getattr(self, f"count{i}").add_(1)
                x = x + block.block(x) * (counts[i] if many else count)
            return x

    step = compiled(Counting(), options={"iterations": iterations})
    for number in (1, 2):
        wide = copy.deepcopy(model).double()

        def link(block, number=number):
            return Link(lambda state, side, hold: ((state[0] + hold(block.block(state[0]) * number),), ()))

        def forward(run, x, wide=wide, link=link):
            return run([link(block) for block in wide], (x,)).states[-1][0]

        program = Program(dict(wide.named_parameters()), forward)
        _, wanted = reference_gradients(program, (x.double(),), loss_of, iterations)
        model.zero_grad()
        loss_of(step(x)).backward()
        assert_gradients_close(gradients(model), wanted, 1e-4, 1e-6)


# -- how it is compiled -------------------------------------------------------------------------------------------


@combination("dynamic batch size and sequence length", "supported", "`dynamic=True`: one compilation for all sizes")
def test_dynamic_batch_and_length():
    model = make()
    step = compiled(model, dynamic=True)
    for shape in ((3, 5, 4), (2, 7, 4)):
        model.zero_grad()
        check(model, inputs(*shape), step)
    assert hwbp_compiler.counters()["graphs_seen"] == 1


@combination("`fullgraph=True`", "supported", "")
def test_fullgraph():
    check(make(), inputs(), fullgraph=True)


@combination('`mode="reduce-overhead"` and `"max-autotune"`', "supported", "")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode):
    # ``mode`` excludes ``options``, so our options are the defaults, and the chain is long enough to be profitable.
    model, x = make(6), inputs()
    loss_of(compiled(model, mode=mode)(x)).backward()
    counted = hwbp_compiler.counters()
    wanted = expected(model, x, 4 if counted["chains_rewritten"] else "exact")
    assert_gradients_close(gradients(model), wanted, 1e-4, 1e-6)
    assert counted["chains_found"] == 1


@combination("a compiled optimizer", "supported", "")
def test_compiled_optimizer():
    model, x = make(), inputs()
    other = copy.deepcopy(model)
    pairs = [(m, torch.optim.SGD(m.parameters(), 0.1)) for m in (model, other)]
    step = compiled(model)
    update = torch.compile(pairs[0][1].step, backend="aot_eager")
    for name, g in expected(other, x).items():
        dict(other.named_parameters())[name].grad = g.float()
    loss_of(step(x)).backward()
    update()
    pairs[1][1].step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@combination("compiled autograd", "supported", "")
def test_compiled_autograd():
    model, x = make(), inputs()
    step = compiled(model)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss_of(step(x)).backward()
    assert_gradients_close(gradients(model), expected(model, x), 1e-4, 1e-6)


# -- copies, files, threads ---------------------------------------------------------------------------------------


@combination("`copy.deepcopy` and `state_dict` of a compiled model", "supported", "")
def test_deepcopy_and_state_dict():
    model, x = make(), inputs()
    step = compiled(model)
    check(model, x, step)
    twin = copy.deepcopy(step)
    assert list(step.state_dict()) == [f"_orig_mod.{key}" for key in model.state_dict()]
    fresh = make()
    fresh.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in twin.state_dict().items()})
    twin.zero_grad()
    loss_of(twin(x)).backward()
    assert_gradients_close(gradients(twin._orig_mod), expected(fresh, x), 1e-4, 1e-6)


@combination(
    "`torch.save` of the weights of a compiled model",
    "supported",
    "save `state_dict()`; a compiled module itself can be pickled only where Inductor's can",
)
def test_save_and_load():
    model, x = make(), inputs()
    step = compiled(model)
    check(model, x, step)
    file = io.BytesIO()
    torch.save(step.state_dict(), file)
    file.seek(0)
    loaded = compiled(make())
    loaded.load_state_dict(torch.load(file))
    torch.testing.assert_close(loaded(x), step(x))


@combination("several compiled models in one process, with different options", "supported", "")
def test_several_models():
    x = inputs()
    models = {k: make() for k in (0, 1, 2)}
    steps = {k: compiled(model, options={"iterations": k}) for k, model in models.items()}
    plain = make()
    loss_of(torch.compile(plain)(x)).backward()
    for k, step in steps.items():
        loss_of(step(x)).backward()
        assert_gradients_close(gradients(models[k]), expected(models[k], x, k), 1e-4, 1e-6)
    assert_gradients_close(gradients(plain), expected(plain, x, "exact"), 1e-4, 1e-6)


@combination(
    "threads",
    "supported",
    "each with its own compiled model; several threads may be the first to look the backend up",
)
def test_threads():
    x = inputs()
    models = [make() for _ in range(3)]
    steps = [compiled(model) for model in models]
    failed = []

    def train(model, step):
        try:
            loss_of(step(x)).backward()
            assert_gradients_close(gradients(model), expected(model, x), 1e-4, 1e-6)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=train, args=pair) for pair in zip(models, steps, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not failed and not any(thread.is_alive() for thread in threads), failed


# -- gradients of gradients, and numbers that are none ------------------------------------------------------------


@combination(
    "double backward (`create_graph=True`)",
    "refused",
    "torch.compile's own error: a compiled backward has no derivative",
)
def test_double_backward_is_refused():
    x = inputs().requires_grad_()
    with torch._functorch.config.patch(donated_buffer=False):
        loss = loss_of(compiled(make())(x))
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            first.square().sum().backward()


@combination(
    "inputs that are NaN or infinite",
    "supported",
    "gradients are NaN or infinite wherever eager mode's are not finite",
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad):
    model, x = make(), inputs()
    x[1, 2] = bad
    eager = copy.deepcopy(model)
    loss_of(eager(x)).backward()
    loss_of(compiled(model)(x)).backward()
    for (name, got), wanted in zip(gradients(model).items(), gradients(eager).values(), strict=True):
        assert not (wanted.isfinite().logical_not() & got.isfinite()).any(), name
        assert torch.equal(got.isnan(), wanted.isnan()), name


# -- several processes --------------------------------------------------------------------------------------------


DISTRIBUTED = """
import os, sys, logging, torch, torch.distributed as dist
from torch import nn
sys.path.insert(0, os.environ["TESTS"])
import test_combinations as t, hwbp_compiler
from hwbp_compiler.testing import assert_gradients_close

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
model, shards = t.make(), [t.inputs(2, 4), t.inputs(2, 4).flip(1)]
wanted = [t.expected(model, x) for x in shards]
wanted = {k: (wanted[0][k] + wanted[1][k]) / 2 for k in wanted[0]}
exact = [t.expected(model, x, "exact") for x in shards]
exact = {k: (exact[0][k] + exact[1][k]) / 2 for k in exact[0]}


class Net(nn.Module):  # Dynamo leaves nn.Sequential's own forward to eager mode where a graph breaks in front of it
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


net = Net(model)
"""

DDP = """
from torch.nn.parallel import DistributedDataParallel
cut = os.environ["CUT"] == "1"
if cut:
    dist._DEFAULT_FIRST_BUCKET_BYTES = 100
wrapped = DistributedDataParallel(net, bucket_cap_mb=1e-4 if cut else 25)
step = t.compiled(wrapped, options={"min_length": 4})
t.loss_of(step(shards[rank])).backward()
counted = hwbp_compiler.counters()
if cut:
    assert counted["graphs_seen"] > 1 and not counted["chains_rewritten"], counted
    wanted = exact
else:
    assert counted["chains_rewritten"] == 1, counted
assert_gradients_close(t.gradients(model), wanted, 1e-4, 1e-6)
print("RIGHT", flush=True)
dist.destroy_process_group()
"""

FSDP = """
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cpu", (2,))
if os.environ["CUT"] == "1":
    for block in model:
        fully_shard(block, mesh=mesh)
    wanted = exact
fully_shard(net, mesh=mesh)
t.loss_of(t.compiled(net)(shards[rank])).backward()
found = {k: p.grad.full_tensor() for k, p in model.named_parameters()}
print(hwbp_compiler.counters(), flush=True)
assert (hwbp_compiler.counters()["chains_rewritten"] > 0) == (os.environ["CUT"] == "0")
assert_gradients_close(found, wanted, 1e-4, 1e-6)
print("RIGHT", flush=True)
dist.destroy_process_group()
"""


def two_processes(code: str, tmp_path, cut: bool) -> str:
    environment = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "TESTS": str(Path(__file__).parent), "CUT": str(int(cut)), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED + code)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)], env={**environment, "RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=280)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and "RIGHT" in output, output
    return outputs[0]


@combination(
    "`DistributedDataParallel`",
    "supported",
    "Dynamo's DDP optimizer cuts a model of more than one bucket. One warning says so, and that "
    "`torch._dynamo.config.optimize_ddp = False` keeps the model whole",
)
@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True], ids=["one_bucket", "cut_at_buckets"])
def test_distributed_data_parallel(cut, tmp_path):
    output = two_processes(DDP, tmp_path, cut)
    assert ("optimize_ddp = False keeps the model whole" in output) == cut


@combination("FSDP2 (`fully_shard`) of the whole model", "supported", "")
@pytest.mark.slow
def test_fully_sharded_whole_model(tmp_path):
    two_processes(FSDP, tmp_path, cut=False)


@combination(
    "FSDP2 (`fully_shard`) of every block",
    "declined",
    "each block is gathered and compiled on its own, so there is no chain, and gradients are exact",
)
@pytest.mark.slow
def test_fully_sharded_blocks_are_left_exact(tmp_path):
    two_processes(FSDP, tmp_path, cut=True)


# -- trainers -----------------------------------------------------------------------------------------------------


class _Loss(nn.Module):
    """A model as trainers expect it: ``forward(x, labels) -> {"loss", "logits"}``."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x, labels=None):
        logits = self.body(x)
        return {"loss": loss_of(logits), "logits": logits}


@combination(
    "Hugging Face `Trainer` with `torch_compile_backend`",
    "supported",
    "after `import hwbp_compiler.huggingface`, since Accelerate has a fixed list of backends; with the default options",
)
@pytest.mark.slow
def test_hugging_face_trainer(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    importlib.import_module("hwbp_compiler.huggingface")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("BACKEND", "MODE"):  # Accelerate reads the arguments from the environment
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
    model, x = make(), inputs()
    body = copy.deepcopy(model)
    arguments = transformers.TrainingArguments(
        str(tmp_path), torch_compile=True, torch_compile_backend="highway", max_steps=1, report_to=[], use_cpu=True,
        per_device_train_batch_size=3, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
        disable_tqdm=True, save_strategy="no", dataloader_drop_last=True,
    )  # fmt: skip
    data = [{"x": row, "labels": torch.zeros(())} for row in x]
    transformers.Trainer(_Loss(body), arguments, train_dataset=data).train()
    counted = hwbp_compiler.counters()
    assert counted["chains_found"] >= 1
    wanted = expected(model, x, 4 if counted["chains_rewritten"] else "exact")
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            dict(body.named_parameters())[name], p - 0.1 * wanted[name].float(), rtol=1e-3, atol=1e-5
        )


@combination("Accelerate", "supported", "")
@pytest.mark.slow
def test_accelerate(monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    model, x = make(), inputs()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wanted = expected(model, x)
    prepared, optimizer = accelerator.prepare(compiled(model), optimizer)
    accelerator.backward(loss_of(prepared(x)))
    assert_gradients_close(gradients(model), wanted, 1e-4, 1e-6)
    optimizer.step()


@combination("Lightning", "supported", "")
@pytest.mark.slow
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    model, x = make(), inputs()
    wanted = expected(model, x)
    seen = {}

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.step = compiled(model)

        def training_step(self, batch, index):
            return loss_of(self.step(batch))

        def on_after_backward(self):
            seen.update({k: g.clone() for k, g in gradients(model).items()})

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(x, batch_size=3))
    assert_gradients_close(seen, wanted, 1e-4, 1e-6)


@pytest.mark.slow
def test_lightning_logs_the_cosine_and_climbs(tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    from hwbp_compiler.lightning import HighwayCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.step = compiled(make(), options={"iterations": 0})

        def training_step(self, batch, index):
            return loss_of(self.step(batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    callback = HighwayCallback(
        every=1, rungs=[{"iterations": 0}, {"iterations": "exact"}], below=0.99999, milestones={0: {"damping": 0.0}}
    )
    logger = CSVLogger(tmp_path)
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.cat([inputs()] * 4), batch_size=3))
    assert callback.meter is None  # the training is over
    assert callback.state_dict() == {"schedule": {"steps": 4}, "climb": {"position": 1}}
    columns = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert [c for c in columns if c.startswith("highway/cosine")] == ["highway/cosine/k0_S1"]  # then it was exact


@pytest.mark.slow
def test_hugging_face_trainer_logs_the_cosine(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    huggingface = importlib.import_module("hwbp_compiler.huggingface")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
    arguments = transformers.TrainingArguments(
        str(tmp_path), torch_compile=True, torch_compile_backend="highway", max_steps=4, report_to=[], use_cpu=True,
        per_device_train_batch_size=3, optim="sgd", disable_tqdm=True, save_strategy="no", dataloader_drop_last=True,
    )  # fmt: skip
    data = [{"x": row, "labels": torch.zeros(())} for row in torch.cat([inputs()] * 4)]
    trainer = transformers.Trainer(_Loss(copy.deepcopy(make())), arguments, train_dataset=data)
    trainer.add_callback(huggingface.HighwayCallback(trainer, every=1, milestones={0: {"iterations": 1, "segment": 1}}))
    trainer.train()
    cosines = [row["highway/cosine/k1_S1"] for row in trainer.state.log_history if "highway/cosine/k1_S1" in row]
    assert cosines and all(0 < cosine <= 1 + 1e-6 for cosine in cosines)


def test_the_warning_of_cut_graphs_is_given_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "ddp_cuts_graphs", lambda: True)
    backend._warn_of_cuts.cache_clear()
    for _ in range(2):
        torch._dynamo.reset()
        compiled(make())(inputs())
    warned = [r for r in caplog.records if r.levelno == logging.WARNING and "optimize_ddp" in r.getMessage()]
    assert len(warned) == 1
