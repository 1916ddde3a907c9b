"""What all models need, loaded once: each model runs in a forked copy of this process."""

from __future__ import annotations

import contextlib
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch._inductor.compile_fx  # noqa: E402

import hwbp_compiler.testing.capture  # noqa: E402, F401

torch.set_num_threads(1)
logging.disable(logging.CRITICAL)
with contextlib.suppress(ImportError):
    import transformers  # noqa: F401
    import transformers.modeling_utils
    import transformers.models.auto  # noqa: F401

from . import cases, measure  # noqa: E402, F401
