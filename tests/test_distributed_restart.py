"""A rank is killed: torchrun starts all ranks again, and the losses go on as if nothing had happened."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS, EVERY, DEADLY = 6, 2, 5

# The example, in which rank 0 is killed in one step of the first attempt.
SCRIPT = f"""
import os, runpy, signal, sys
from hwbp_compiler.distributed import ScheduleHighway

steps, step = [0], ScheduleHighway.step

def counted(self, *args, **kwargs):
    steps[0] += 1
    if os.environ.get("KILL") and os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if steps[0] == {DEADLY}:
            os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

ScheduleHighway.step = counted
sys.argv = ["layer_parallel.py", *sys.argv[1:]]
runpy.run_path("{ROOT}/examples/layer_parallel.py", run_name="__main__")
"""


def losses(folder: Path, ranks: int, kill: bool, steps: int = STEPS) -> list[tuple[int, str]]:
    """(step, loss) as printed."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/examples", "OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "KILL": "1" if kill else ""}
    # Otherwise new ranks find the addresses of the old ones in torchrun's store (pytorch issue 135712).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    options = ["--steps", steps, "--every", EVERY, "--blocks", 4, "--width", 8, "--batch", 8, "--iterations", 1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    command += ["--max-restarts", 1, script, *options, "--checkpoints", folder / "checkpoints"]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [(int(step), loss) for step, loss in re.findall(r"^step (\d+): loss (\S+),", done.stdout, re.MULTILINE)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("undisturbed"), 2, kill=False)


def test_losses_go_on_as_without_the_fault(undisturbed, tmp_path):
    disturbed = losses(tmp_path, 2, kill=True)
    assert [step for step, _ in undisturbed] == [1, 2, 4, 6]
    # The fifth step was taken twice; the fourth is in the last checkpoint.
    assert disturbed == undisturbed


def test_another_number_of_ranks_goes_on_from_the_same_checkpoint(undisturbed, tmp_path):
    """With two or three ranks, k = 1 is ordinary backprop."""
    losses(tmp_path, 2, kill=False, steps=EVERY)
    later = losses(tmp_path, 3, kill=False)
    assert later == [(step, loss) for step, loss in undisturbed if step > EVERY]
