"""Every test starts as if in a fresh process, and no test reads or writes the user's compile caches."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest

WORKER = "PYTEST_XDIST_WORKER" in os.environ

# Set before torch is imported. The session has its own directory. xdist's workers and the processes that tests start
# inherit it, so that compiled C++ is shared.
if not WORKER:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="hwbp_test_")
# Starting a pool of compile processes takes longer than compiling these tests' kernels.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from torch._functorch import config as functorch_config  # noqa: E402
from torch._inductor import config as inductor_config  # noqa: E402

import hwbp_compiler  # noqa: E402

# Keep the structured trace of compilations out of the logs: it adds hundreds of empty records to the report of every
# failing test.
logging.getLogger("torch.__trace").propagate = False


def pytest_configure(config: pytest.Config) -> None:
    if WORKER:
        torch.set_num_threads(1)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not WORKER:
        shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by mark
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of ``slow.txt``."""
    lines = Path(__file__).with_name("slow.txt").read_text().splitlines()
    slow = tuple(line for line in lines if line and not line.startswith("#"))
    for item in items:
        if item.nodeid.startswith(slow):
            item.add_marker("slow")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:  # all tests are here
        unknown = [line for line in slow if not any(item.nodeid.startswith(line) for item in items)]
        if unknown:
            raise pytest.UsageError(f"slow.txt names tests that do not exist: {', '.join(unknown)}")


@pytest.fixture(autouse=True)
def fresh_state():
    torch._dynamo.reset()
    hwbp_compiler.reset_counters()
    torch.manual_seed(0)
    # Without this, a graph found in a cache would run no pass, and a test's counts would depend on earlier tests.
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def float64():
    """New tensors are float64 unless a test says otherwise, and random numbers start anew."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
