"""Every private torch API the package uses, in this one file. Read and run on torch 2.11.0, 2.13.0 and 2.14.1.

| name here | torch's | why |
|---|---|---|
| `ShortenTraceback` | `torch._dynamo.exc` | exceptions of this class leave a backend unwrapped |
| `CONTROL_FLOW` | `torch._dynamo.exc` | what a backend raises to make Dynamo start again is no failure |
| `CustomGraphPass` | `torch._inductor.custom_graph_pass` | a pass with a uuid keeps graphs cacheable |
| `compile_fx` | `torch._inductor.compile_fx` | Inductor itself, with config patches for one compilation |
| `counter` | `torch._dynamo.utils.counters` | where every other part of torch.compile counts |
| `inductor_patches` | `torch._TorchCompileInductorWrapper` | how Inductor reads `mode=` and `options=` |
| `inductor_option_type` | `torch._inductor.config.get_type` | what to say when Inductor refuses a value |
| `user_joint_passes` | `torch._inductor.config` | the user's own `joint_custom_pre_pass` |
| `check_when_configured` | `torch._dynamo.eval_frame.get_compiler_fn` | sees a backend with its options |
| `ddp_cuts_graphs` | `DistributedDataParallel._get_active_ddp_module`, `torch._dynamo.utils.get_optimize_ddp_mode` | \
whether Dynamo's DDP optimizer is about to split the model at its buckets |
| (import) | `torch._inductor.inductor_prims` | registers `prims.fma`, which joint graphs contain |

`torch._inductor.list_options` and `list_mode_options` are public.
"""

from __future__ import annotations

import functools
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._inductor.config as inductor_config
import torch._inductor.inductor_prims
from torch._dynamo import eval_frame
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch._dynamo.exc import ShortenTraceback as ShortenTraceback
from torch._dynamo.utils import counters as _counters
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass

CONTROL_FLOW = (RestartAnalysis, SkipFrame)
NEWEST_KNOWN = (2, 14)


def _warn_if_newer(version: str) -> None:
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if release > NEWEST_KNOWN:
        known = ".".join(map(str, NEWEST_KNOWN))
        warnings.warn(
            f"hwbp_compiler uses private parts of torch.compile that were read up to torch {known}; this is "
            f"torch {version}. If it misbehaves, options={{'rewrite': 'never'}} gives plain Inductor.",
            stacklevel=2,
        )


_warn_if_newer(torch.__version__)


def compile_fx(gm: torch.fx.GraphModule, example_inputs: list[Any], patches: Mapping[str, Any]) -> Any:
    """Compile a Dynamo graph with Inductor, ``patches`` laid over its config for this compilation alone."""
    # Imported late: it brings in all of Inductor, which a process that only looks at options never needs.
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, example_inputs, config_patches=dict(patches))


def counter() -> Counter[str]:
    """Our section of torch.compile's process-wide counters."""
    return _counters["highway"]


def inductor_patches(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config patches ``backend="inductor"`` would make of ``mode`` and ``options``.

    Raises RuntimeError where Inductor refuses a key, the type of a value or the mode.
    """
    return torch._TorchCompileInductorWrapper(mode, options, None).config


def inductor_option_type(key: str) -> str:
    """The type Inductor's config declares for ``key``, as readable text."""
    declared = inductor_config.get_type(key)
    plain = typing.get_origin(declared) is None and isinstance(declared, type)
    return declared.__name__ if plain else str(declared)


def user_joint_passes(patches: Mapping[str, Any]) -> tuple[Callable[[torch.fx.Graph], Any], ...]:
    """The joint pre-passes in force before ours: those in ``patches``, else those in Inductor's config."""
    chosen = patches.get("joint_custom_pre_pass", inductor_config.joint_custom_pre_pass)
    if chosen is None:
        return ()
    # Newer releases also take several; older ones take one.
    return tuple(chosen) if isinstance(chosen, (list, tuple)) else (chosen,)


def check_when_configured(backend: Callable[..., Any], check: Callable[..., Any]) -> None:
    """Call ``check(mode=..., options=...)`` whenever ``torch.compile`` is given ``backend``, at that moment.

    ``torch.compile`` hands options to a named backend only with the first graph, deep inside the first call
    of the model. Every backend passes through ``get_compiler_fn`` when ``torch.compile`` is called; others
    are left exactly as they are.
    """
    original = eval_frame.get_compiler_fn

    @functools.wraps(original)
    def get_compiler_fn(compiler_fn: Any) -> Any:
        if isinstance(compiler_fn, torch._TorchCompileWrapper) and compiler_fn.compiler_fn is backend:
            check(**compiler_fn.kwargs)
        return original(compiler_fn)

    eval_frame.get_compiler_fn = get_compiler_fn


def ddp_cuts_graphs() -> bool:
    """Whether what is being compiled is a DistributedDataParallel model that Dynamo splits at bucket boundaries.

    Dynamo's DDP optimizer compiles one graph per bucket of gradients. False where the model fits into one.
    """
    if not torch.distributed.is_available():
        return False
    from torch._dynamo.utils import get_optimize_ddp_mode
    from torch.nn.parallel import DistributedDataParallel

    module = DistributedDataParallel._get_active_ddp_module()
    if module is None or get_optimize_ddp_mode() != "ddp_optimizer":
        return False
    size = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return size > min(module.bucket_bytes_cap, torch.distributed._DEFAULT_FIRST_BUCKET_BYTES)
