"""If a rank fails, all ranks end within the process group's time-out, and all say which rank it was and why."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pipelines import PreLN, loss_fn
from torch import nn

RANKS, TIMEOUT = 3, 12
FAULTY = 1


class Faulty(PreLN):
    """Fails in its third call. That is in the second step, because torch calls it once to find out the shapes."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.calls = fault, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3 and type(x) is torch.Tensor:  # not a copy that is being traced
            self.fault()
        return super().forward(x)


def raises():
    raise ValueError("the weather is bad")


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def stalls():
    time.sleep(1000)


def nothing():
    pass


def worker(rank, folder, fault, last_batch):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT))
    from torch.distributed.pipelining import PipelineStage

    from hwbp_compiler.distributed import ScheduleHighway

    module = nn.Sequential(Faulty(fault) if rank == FAULTY else PreLN(), PreLN())
    schedule = ScheduleHighway(PipelineStage(module, rank, RANKS, torch.device("cpu")), 1, loss_fn=loss_fn)
    began = time.monotonic()
    try:
        for step in range(3):
            began = time.monotonic()
            size = last_batch if step else 4
            x, target = torch.randn(size, 2, 5), torch.randn(size, 2, 5)
            schedule.step(*([x] if rank == 0 else []), target=target if rank == RANKS - 1 else None)
        said = "nothing went wrong"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    Path(f"{folder}/{rank}").write_text(f"{time.monotonic() - began:.1f}\n{said}")
    os._exit(0)  # like a script that ends with an error: without waiting for other ranks


def end_of_all(folder, fault, last_batch=4):
    """For each rank, the seconds since the step began and its error message, or None if it has no message."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(r, str(folder), fault, last_batch)) for r in range(RANKS)]
    for process in processes:
        process.start()
    try:
        until = time.monotonic() + 120
        others = [p for r, p in enumerate(processes) if r != FAULTY or fault is not stalls]
        for process in others:
            process.join(max(0.0, until - time.monotonic()))
        assert not any(p.is_alive() for p in others), "a rank hangs"
    finally:
        for process in processes:
            process.kill()
    found = []
    for rank in range(RANKS):
        path = folder / str(rank)
        seconds, _, said = path.read_text().partition("\n") if path.exists() else ("", "", "")
        found.append((float(seconds), said) if said else None)
    return found


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (raises, "rank 1 (stage 1) raised ValueError: the weather is bad"),
        (is_killed, "rank 1 does not answer: its process has ended, or hangs"),
        (stalls, "rank 1 (stage 1) stalls: it runs its forward pass of micro-batch 0 for"),
    ],
    ids=["raises", "is_killed", "stalls"],
)
def test_all_ranks_name_the_one_that(fault, words, tmp_path):
    found = end_of_all(tmp_path, fault)
    for rank, told in enumerate(found):
        if rank == FAULTY:
            continue
        assert told is not None
        seconds, said = told
        assert said.startswith("RankError: ScheduleHighway: ") and words in said
        assert seconds < TIMEOUT + 15  # the group's time-out, the answers, and a margin for a busy machine


def test_a_batch_of_another_size_is_refused(tmp_path):
    first, *others = end_of_all(tmp_path, nothing, last_batch=3)
    assert first is not None
    assert "StageError" in first[1] and "float32 [3, 2, 5]" in first[1] and "must be alike" in first[1]
    for told in others:
        assert told is not None and "rank 0 (stage 0) raised" in told[1]


GLOO = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]")


@pytest.mark.parametrize(
    ("first", "wrapped", "of_others"),
    [
        (GLOO, False, True),
        (GLOO, True, True),  # in the reduction of gradients in a stage's backward pass
        (dist.DistBackendError("NCCL error"), True, True),
        (ValueError("the weather is bad"), True, False),
        (RuntimeError("the socket is full"), True, False),
        (RuntimeError("Broken pipe"), False, True),
    ],
)
def test_an_error_is_of_others_if_what_it_began_with_is(first, wrapped, of_others):
    from hwbp_compiler.distributed.faults import is_communication

    error = RuntimeError("a stage failed to run backward")
    error.__cause__ = first
    assert is_communication(error if wrapped else first) is of_others


def word_of_another(rank, folder):
    """Rank 1 fails in ways that leave the group working, and rank 0 learns of each failure."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
    from hwbp_compiler.distributed.faults import watch_of

    watch = watch_of("distributed.recurrent", dist.group.WORLD, "a stretch of time")
    said = []
    for what in ("first", "second"):
        try:
            with watch.guarded():
                if rank == 1:
                    raise ValueError(f"the {what} fault")
                raise RuntimeError("Connection closed by peer")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        while not store.check([f"{what}-{1 - rank}"]):
            store.set(f"{what}-{rank}", "1")
            time.sleep(0.1)
        store.set(f"{what}-{rank}", "1")
        watch.agreed()
    Path(f"{folder}/{rank}").write_text("\n".join(said))
    os._exit(0)


def test_a_fault_that_was_got_over_is_not_the_next_one(tmp_path):
    torch.multiprocessing.spawn(word_of_another, (str(tmp_path),), 2)
    first, second = (tmp_path / "0").read_text().splitlines()
    for told, what in ((first, "first"), (second, "second")):
        assert (
            f"RankError: distributed.recurrent: rank 1 (a stretch of time) raised ValueError: the {what} fault" in told
        )


def refuses_along_time(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    from hwbp_compiler.distributed import recurrent

    try:
        recurrent(nn.GRU(2, 3, num_layers=2, dropout=0.5 * rank), torch.randn(2, 4, 2), mesh=mesh)
        said = "nothing went wrong"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    Path(f"{folder}/{rank}").write_text(said)
    os._exit(0)


def test_what_one_rank_refuses_along_time_all_are_told_of(tmp_path):
    torch.multiprocessing.spawn(refuses_along_time, (str(tmp_path),), 2)
    other, own = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert own.startswith("StageError") and "dropout" in own
    assert "RankError: distributed.recurrent: rank 1 (a stretch of time) raised StageError" in other


def beside_data_parallelism(rank, folder):
    """Two pipelines of two stages. Global rank 3, the last stage of the second pipeline, fails in its second step."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=TIMEOUT))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "layer"))
    from torch.distributed.pipelining import PipelineStage

    from hwbp_compiler.distributed import ScheduleHighway

    index = rank % 2
    module = nn.Sequential(Faulty(raises) if rank == 3 else PreLN(), PreLN())
    held = nn.parallel.DistributedDataParallel(module, process_group=mesh["data"].get_group())
    group = mesh["layer"].get_group()
    schedule = ScheduleHighway(PipelineStage(held, index, 2, torch.device("cpu"), group=group), 1, loss_fn=loss_fn)
    try:
        for _ in range(2):
            x, target = torch.randn(4, 2, 5), torch.randn(4, 2, 5)
            schedule.step(*([x] if index == 0 else []), target=target if index == 1 else None)
        said = "nothing went wrong"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        said += f" because of {error.__cause__}"
    Path(f"{folder}/{rank}").write_text(said)
    if rank == 0:
        time.sleep(TIMEOUT)  # others look for messages in the store that this process hosts
    os._exit(0)


@pytest.mark.slow
def test_a_rank_that_loses_its_copy_is_not_the_one_at_fault(tmp_path):
    torch.multiprocessing.spawn(beside_data_parallelism, (str(tmp_path),), 4)
    said = [(tmp_path / str(rank)).read_text() for rank in range(4)]
    assert said[3].endswith("because of the weather is bad")
    assert said[2].startswith("RankError") and "rank 1 (stage 1, global rank 3) raised ValueError" in said[2]
    for told in said[:2]:
        assert told.startswith("RankError") and " raised " not in told.partition("; this rank")[0], told


def trains_with_a_scaler(rank, folder):
    """In the first step, one parameter of rank 1 gets an infinite gradient."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT))
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
    from torch.distributed.pipelining import PipelineStage

    from hwbp_compiler.distributed import ScheduleHighway

    torch.manual_seed(rank)
    module = PreLN()
    scaler = ShardedGradScaler("cpu", init_scale=4.0, process_group=dist.group.WORLD)
    scaler.scale(torch.zeros(()))  # ranks without a loss need the scale too
    schedule = ScheduleHighway(
        PipelineStage(module, rank, RANKS, torch.device("cpu")),
        1,
        loss_fn=lambda y, target: scaler.scale(loss_fn(y, target)),
        iterations=0,
    )
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    changed = []
    for step in range(2):
        x, target = torch.randn(4, 2, 5), torch.randn(4, 2, 5)
        optimizer.zero_grad()
        before = [p.detach().clone() for p in module.parameters()]
        schedule.step(*([x] if rank == 0 else []), target=target if rank == RANKS - 1 else None)
        if rank == FAULTY and step == 0:
            next(module.parameters()).grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        changed.append(not all(map(torch.equal, before, module.parameters())))
    Path(f"{folder}/{rank}").write_text(f"{changed}, scale {scaler.get_scale()}")
    os._exit(0)


def test_an_infinite_gradient_on_one_rank_reaches_every_ranks_check(tmp_path):
    torch.multiprocessing.spawn(trains_with_a_scaler, (str(tmp_path),), RANKS)
    assert {(tmp_path / str(rank)).read_text() for rank in range(RANKS)} == {"[False, True], scale 2.0"}
