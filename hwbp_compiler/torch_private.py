"""Every private torch API that the package uses. They are all in this file, however long it grows: only this file must
be checked against a new torch release. ``tests/test_torch_private.py`` makes sure that no other file names one. All of
them exist in torch 2.11.0, 2.13.0 and 2.14.1; docs/reliability.md says which tests ran on each.

| name here | torch's | why |
|---|---|---|
| `ShortenTraceback` | `torch._dynamo.exc` | exceptions of this class leave a backend unwrapped |
| `CONTROL_FLOW` | `torch._dynamo.exc` | exceptions that make Dynamo start again; they are not failures |
| `CustomGraphPass` | `torch._inductor.custom_graph_pass` | a pass with a uuid keeps graphs cacheable |
| `CustomSchedulerPass`, `SCHEDULER_PASS`, `AFTER_FUSION` | the same, `torch._inductor.config` | passes over kernels |
| `compile_fx` | `torch._inductor.compile_fx` | Inductor itself, with config patches for one compilation |
| `compile_step` | `torch._inductor.compile_fx.compile_fx_inner` | a graph called often, without guards around it |
| `StepInCpp` | the same with `cpp_wrapper`, and the names in the C++ it writes | a step that C++ can call |
| `tensor_handle`, `tensor_functions` | `torch._C._aoti`, `aoti_torch_*` in libtorch_cpu | tensors for such a step |
| `counter` | `torch._dynamo.utils.counters` | where all parts of torch.compile count |
| `inductor_patches` | `torch._TorchCompileInductorWrapper` | how Inductor reads `mode=` and `options=` |
| `inductor_option_type` | `torch._inductor.config.get_type` | for the message when Inductor refuses a value |
| `user_joint_passes` | `torch._inductor.config` | the user's own `joint_custom_pre_pass` |
| `configure_backend` | `torch._dynamo.eval_frame.get_compiler_fn` | sees a backend, its options; `backend_ctx_ctor` |
| `registered_by_any_thread` | `torch._dynamo.backends.registry` | several threads may look a backend up at once |
| `watch_nested` | `torch._dynamo.eval_frame._TorchDynamoContext`, `VariableBuilder.wrap_module` \
| finds options that Dynamo drops where it inlines |
| `select_decomp_table` | `torch._inductor.decomposition`, `torch._inductor.lowering` | Inductor's decompositions |
| `ddp_cuts_graphs` | `DistributedDataParallel._get_active_ddp_module`, `torch._dynamo.utils.get_optimize_ddp_mode` | \
whether Dynamo's DDP optimizer is about to split the model at its buckets |
| `FakeTensor` | `torch._subclasses.fake_tensor` | the type of the values in a traced graph |
| `backward_at_once` | `torch._functorch.config` | otherwise backward graphs are compiled when first run |
| `runs_backward_once` | `CompiledFunction.metadata` in `torch._functorch`, `._forward_cls` | whether backward \
may run twice |
| `device_decompositions` | `torch._inductor.decomposition.select_decomp_table` | some depend on the device |
| `cuda_device_guard` | libc10's `device_guard_impl_registry` | fake CUDA tensors in a torch without CUDA |
| `allow_rnn` | `torch._dynamo.config.allow_rnn` and its `_config` | recurrent modules in the graph |
| `override_python_kernels` | `OpOverload.py_kernels` | what tracing runs for `aten.gru` and similar operators |
| `guard_composite` | `OpOverload.py_impl`, `._op_dk` | tracing breaks the graph at `aten._pad_packed_sequence` |
| `recording_autograd`, `below_autograd` | `torch._C._ForceDispatchKeyGuard` | autograd on or off in a kernel |
| `observed` | `torch.fx.passes.graph_transform_observer` | names, times and can switch off a pass |
| `timed` | `torch._dynamo.utils.dynamo_timed` | times a step among Dynamo's own compile times |
| `trace_artifact` | `torch._logging.trace_structured` | what `tlparse` shows |
| `compilations_forgotten` | `torch._dynamo.eval_frame._debug_get_cache_entry_list`, `torch._dynamo.convert_frame`, \
`torch._dynamo.guards` | on torch 2.11, which cannot keep compilations of the same code apart |
| `serving_backend`, `tracing_for_another_backend` | `torch._dynamo.symbolic_convert` | whose graph is traced |
| `watch_graph_breaks` | `InstructionTranslatorBase.log_graph_break` there | reports where Dynamo breaks our graphs |
| `watch_frames`, `seen_codes`, `was_seen`, `set_code_exec_strategy`, `FrameExecStrategy` and its parts | \
`torch._dynamo.convert_frame`, `torch._dynamo.types`, `torch._C._dynamo.eval_frame` | which frames Dynamo has given up |
| `never_traced` | `torch._dynamo.trace_rules` | frames that Dynamo passes over for every backend |
| `compiles_now`, `in_an_isolated_region`, `CacheHits` | `torch._dynamo.eval_frame` | whether a call compiled anything |
| (import) | `torch._inductor.inductor_prims` | registers `prims.fma`, which joint graphs contain |

``LATE`` lists names that are used unchanged, each in one place: our name, then torch's.

`torch._inductor.list_options` and `list_mode_options` are public.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import inspect
import sys
import threading
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from traceback import FrameSummary
from types import CodeType
from typing import Any, TypeVar

import torch
import torch._dynamo.config as dynamo_config
import torch._guards
import torch._inductor.config as inductor_config
import torch._inductor.inductor_prims
from torch._C._dynamo.eval_frame import set_code_exec_strategy as set_code_exec_strategy
from torch._C._dynamo.eval_frame import set_guard_complete_hook
from torch._dynamo import convert_frame, eval_frame, trace_rules
from torch._dynamo.backends import registry
from torch._dynamo.exc import RestartAnalysis
from torch._dynamo.exc import ShortenTraceback as ShortenTraceback
from torch._dynamo.exc import SkipFrame as SkipFrame
from torch._dynamo.types import ConvertFrameReturn as ConvertFrameReturn
from torch._dynamo.types import FrameAction as FrameAction
from torch._dynamo.types import FrameExecStrategy as FrameExecStrategy
from torch._dynamo.utils import counters as _counters
from torch._dynamo.utils import dynamo_timed
from torch._functorch import config as functorch_config
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
from torch._logging import trace_structured
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

try:
    from torch._inductor.custom_graph_pass import CustomSchedulerPass as CustomSchedulerPass
except ImportError:  # torch 2.11 has one class for passes over kernels and over graphs
    CustomSchedulerPass = CustomGraphPass  # type: ignore

CONTROL_FLOW = (RestartAnalysis, SkipFrame)
SCHEDULER_PASS = "_pre_fusion_custom_pass"
AFTER_FUSION = "_post_fusion_custom_pass"
NEWEST_KNOWN = (2, 14)

# name here -> torch's module, or module:name. Imported on first use, because most of them load all of Inductor.
LATE = {
    # scan/inductor.py: the lowering of linear_scan
    "BackendFeature": "torch._inductor.codegen.common:BackendFeature",
    "CeilDiv": "torch.utils._sympy.functions:CeilDiv",
    "DeviceProperties": "torch._inductor.runtime.hints:DeviceProperties",
    "ReductionHint": "torch._inductor.runtime.hints:ReductionHint",
    "V": "torch._inductor.virtualized:V",
    "fallback_handler": "torch._inductor.lowering:fallback_handler",
    "ir": "torch._inductor.ir",
    "lowerings": "torch._inductor.lowering:lowerings",
    "ops": "torch._inductor.virtualized:ops",
    "pointwise_cat": "torch._inductor.lowering:pointwise_cat",
    "register_lowering": "torch._inductor.lowering:register_lowering",
    # scan/operator.py: an autograd function at the level of one torch.func transform, as torch.func has its own
    "AutoDispatchBelowAutograd": "torch._C:_AutoDispatchBelowAutograd",
    "DispatchKeySet": "torch._C:DispatchKeySet",
    "SingleLevelFunction": "torch.autograd.function:_SingleLevelFunction",
    "after_autograd_keyset": "torch._C:_after_autograd_keyset",
    "enable_single_level_autograd_function": "torch._functorch.utils:enable_single_level_autograd_function",
    "functorch_levels": "torch._C:_functorch",
    "set_forward_grad_enabled": "torch.autograd.forward_ad:_set_fwd_grad_enabled",
    # scan/cpu.py builds its kernel as Inductor builds those of a CPU
    "CppCodeCache": "torch._inductor.codecache:CppCodeCache",
    # cross_compile.py: code for a device that is not there (with triton.runtime.driver of triton 3.6 to 3.8)
    "CacheBase": "torch._inductor.codecache:CacheBase",
    "CudaInterface": "torch._dynamo.device_interface:CudaInterface",
    "DebugContext": "torch._inductor.debug:DebugContext",
    "GraphLowering": "torch._inductor.graph:GraphLowering",
    "fake_tensor_prop": "torch._inductor.compile_fx:fake_tensor_prop",
    "inductor_utils": "torch._inductor.utils",
    "post_grad_passes": "torch._inductor.compile_fx:_recursive_post_grad_passes",
    "record_output_strides": "torch._inductor.compile_fx:_recursive_record_original_output_strides",
    "select_algorithm": "torch._inductor.select_algorithm",
    "triton_helpers": "torch._inductor.runtime.triton_helpers",
    "triton_utils": "torch.utils._triton",
    "view_to_reshape": "torch._inductor.compile_fx:view_to_reshape",
    # doctor.py
    "cache_dir": "torch._inductor.runtime.runtime_utils:cache_dir",
    "get_cpp_compiler": "torch._inductor.cpp_builder:get_cpp_compiler",
    # rolled/: one step of a user's cell, traced and made functional
    "set_grad_enabled": "torch._C:_set_grad_enabled",
    "enter_autocast": "torch.amp.autocast_mode:_enter_autocast",
    "exit_autocast": "torch.amp.autocast_mode:_exit_autocast",
    "FunctionalTensor": "torch._subclasses.functional_tensor:FunctionalTensor",
    "FunctionalTensorMode": "torch._subclasses.functional_tensor:FunctionalTensorMode",
    "PythonReferenceAnalysis": "torch.utils._sympy.reference:PythonReferenceAnalysis",
    "TorchDynamoException": "torch._dynamo.exc:TorchDynamoException",
    "without_saved_tensor_hooks": "torch._dynamo.utils:_disable_saved_tensors_hooks_during_tracing",
    "dispatch_functionalize": "torch._subclasses.functional_tensor:dispatch_functionalize",
    "enable_python_dispatcher": "torch._dispatch.python:enable_python_dispatcher",
    "has_data_mutation": "torch:_functionalize_has_data_mutation",
    "sympy_interp": "torch.utils._sympy.interp:sympy_interp",
    "wrap": "torch._higher_order_ops.wrap:wrap",
    # recurrence/tracing.py: raised while Dynamo runs a call on fake tensors, it breaks the graph there
    "UnsupportedOperatorException": "torch._subclasses.fake_tensor:UnsupportedOperatorException",
    # distributed/: a stage's joint graph without Dynamo, and the store where ranks record faults
    "aot_export_joint_with_descriptors": "torch._functorch.aot_autograd:aot_export_joint_with_descriptors",
    "GradAOTOutput": "torch._functorch._aot_autograd.descriptors:GradAOTOutput",
    "PlainAOTInput": "torch._functorch._aot_autograd.descriptors:PlainAOTInput",
    "PlainAOTOutput": "torch._functorch._aot_autograd.descriptors:PlainAOTOutput",
    "ParamAOTInput": "torch._functorch._aot_autograd.descriptors:ParamAOTInput",
    "BufferAOTInput": "torch._functorch._aot_autograd.descriptors:BufferAOTInput",
    "InputMutationAOTOutput": "torch._functorch._aot_autograd.descriptors:InputMutationAOTOutput",
    "TangentAOTInput": "torch._functorch._aot_autograd.descriptors:TangentAOTInput",
    "default_store": "torch.distributed.distributed_c10d:_get_default_store",
    # engine/batching.py, testing/
    "FakeTensorMode": "torch._subclasses:FakeTensorMode",
    "TorchDispatchMode": "torch.utils._python_dispatch:TorchDispatchMode",
    "AsyncCompile": "torch._inductor.async_compile:AsyncCompile",
    "aot_autograd": "torch._dynamo.backends.common:aot_autograd",
    "without_modes": "torch.utils._python_dispatch:_disable_current_modes",
}


def __getattr__(name: str) -> Any:
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = LATE[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


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


def compile_fx(gm: torch.fx.GraphModule, example_inputs: list[Any], patches: Mapping[str, Any], **how: Any) -> Any:
    """Compile a Dynamo graph with Inductor, with ``patches`` applied to its config for this compilation only.

    ``how`` may hold Inductor's ``inner_compile``, which gets every forward and backward graph, and ``decompositions``.
    """
    # Imported late: it loads all of Inductor, which a process that only parses options never needs.
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, example_inputs, config_patches=dict(patches), **how)


def compile_fx_inner() -> Callable[..., Any]:
    """Inductor's compiler for one forward or backward graph."""
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner


def without_layout_optimization(when: Callable[[], bool]) -> Callable[..., Any]:
    """Inductor's ``inner_compile``, which does not change the layout of convolutions if ``when()`` is true."""
    from torch._inductor.compile_fx import compile_fx_inner

    def inner_compile(*args: Any, **kwargs: Any) -> Any:
        patch = {"layout_optimization": False} if when() else {}
        with inductor_config.patch(patch):
            return compile_fx_inner(*args, **kwargs)

    return inner_compile


class LateCompilation:
    """Keeps what a compilation that starts now needs to continue after Dynamo has finished: the symbols of the shapes,
    and the number under which torch files its logs. Torch keeps the same for a backward graph that it compiles when it
    is first run.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        # Dynamo's fake mode, not that of the current compilation: the graph's values were made with Dynamo's.
        self.fake_mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)
        self.number = torch._guards.CompileContext.try_get()
        self.records = torch.is_grad_enabled()
        devices = ["cpu", *([torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else [])]
        self.autocast = [
            (d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d), torch.is_autocast_cache_enabled())
            for d in devices
        ]

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """A context for compiling under the modes that were active when Dynamo traced."""
        from torch.utils._python_dispatch import _disable_current_modes as without_modes

        with contextlib.ExitStack() as stack:
            stack.enter_context(convert_frame.compile_lock)
            stack.enter_context(without_modes())  # modes of a compilation that contains this one
            stack.enter_context(torch._guards.tracing(torch._guards.TracingContext(self.fake_mode)))
            stack.enter_context(torch._guards.compile_context(self.number))
            stack.enter_context(dynamo_timed("highway.late"))
            stack.enter_context(torch.set_grad_enabled(self.records))
            for mode in self.autocast:
                stack.enter_context(torch.autocast(*mode))
            yield

    def guards(self) -> int:
        """The number of known conditions on symbolic sizes."""
        shapes = self.fake_mode and self.fake_mode.shape_env
        return len(shapes.guards) if shapes else 0

    def expression(self, symbols: list[Any]) -> str | None:
        """All conditions in the form that :meth:`holds` takes; None if there are none."""
        return self.fake_mode.shape_env.produce_guards_expression(symbols)  # type: ignore[union-attr]

    def holds(self, expression: str, sizes: list[Any]) -> bool:
        return bool(self.fake_mode.shape_env.evaluate_guards_expression(expression, sizes))  # type: ignore[union-attr]


def without_autocast() -> AbstractContextManager[Any]:
    """While this lasts, operators run in the dtypes of their arguments."""
    return torch._C._DisableAutocast()  # type: ignore[no-any-return]


def saves_through_hooks() -> bool:
    """Whether hooks process what autograd saves, as a checkpoint in eager mode does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def runs_backward_once(outputs: Sequence[torch.Tensor]) -> bool:
    """Whether compiled code behind ``outputs`` frees what it saved in its first backward pass (donated buffers).

    Torch's own check reads only its config, so it misses the case where the config was changed in between.
    """
    todo = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if getattr(getattr(getattr(node, "_forward_cls", None), "metadata", None), "bw_donated_idxs", None):
            return True
        following = [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(following)
        todo += following
    return False


def random_as_compiled(target: Any, args: Any, kwargs: Any) -> Any:
    """The numbers that Inductor's code draws, if ``target`` is one of Inductor's random operators; None for all other
    operators. In eager mode these operators draw other numbers, and different ones again if a backward pass redraws
    them.
    """
    prims = torch.ops.prims
    if target not in {getattr(prims, f"inductor_{name}").default for name in ("seed", "seeds", "random", "randint")}:
        return None
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    places = tuple(
        _SEED if isinstance(a, torch.Tensor) else tuple(a) if isinstance(a, (list, tuple)) else a for a in args
    )
    device = tensors[0].device if tensors else args[-1]
    return _drawing(target, places, tuple(sorted(kwargs.items())), device)(tensors)


_SEED = "seed"


@functools.lru_cache(maxsize=256)
def _drawing(
    target: Any, places: tuple[Any, ...], kwargs: tuple[Any, ...], device: torch.device
) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """The operator alone, compiled. ``places`` are its arguments, with ``_SEED`` in place of tensors."""
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode

    graph = torch.fx.Graph()
    mode = FakeTensorMode()
    with mode:
        seeds = {i: torch.empty((), dtype=torch.int64, device=device) for i, a in enumerate(places) if a == _SEED}
    inputs = {i: graph.placeholder(f"seed{i}") for i in seeds}
    given = [inputs.get(i, list(a) if isinstance(a, tuple) else a) for i, a in enumerate(places)]
    drawn = graph.call_function(target, tuple(given), dict(kwargs))
    graph.output((drawn,))
    for i, node in inputs.items():
        node.meta["val"] = seeds[i]
    with mode:
        drawn.meta["val"] = target(*torch.fx.map_arg(given, lambda node: node.meta["val"]), **dict(kwargs))
    module = torch.fx.GraphModule({}, graph)
    with torch.no_grad(), torch._guards.tracing(torch._guards.TracingContext(mode)), V.set_fake_mode(mode):
        compiled = compile_fx_inner()(module, list(seeds.values()), is_inference=True)
    return lambda tensors: compiled(list(tensors))[0]


def select_decomp_table() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions."""
    importlib.import_module("torch._inductor.lowering")  # the decomposition of max pooling expects it to be imported
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()  # type: ignore[return-value]


def backward_at_once() -> contextlib.AbstractContextManager[Any]:
    """While this lasts, a backward graph is compiled together with its forward, not when it is first run."""
    return functorch_config.patch(force_non_lazy_backward_lowering=True)


@contextlib.contextmanager
def cuda_device_guard() -> Iterator[None]:
    """While this lasts, operators may be called on fake CUDA tensors even if torch was built without CUDA.

    Much of torch's C++ (indexing, ``copy_``, ``~``) fetches the guard of a tensor's device, which switches to that
    device, before it checks whether the tensor is fake. A build without CUDA has no such guard. The meta device has a
    guard that does nothing, and it is used instead.
    """
    torch._C._ensureCUDADeviceGuardSet()  # for a build with CUDA on a machine without a GPU
    library = next(iter(Path(torch.__file__).parent.glob("lib/*c10.*")))
    registry = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(ctypes.CDLL(str(library)), registry)
    missing = guards[_CUDA] is None
    if missing:
        guards[_CUDA] = guards[_META]
    try:
        yield
    finally:
        if missing:
            guards[_CUDA] = None


_CUDA, _META = 1, 14  # c10::DeviceType


def device_decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions, except those that write out small matrix products on a CPU but not on a GPU."""
    products = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm}
    table = select_decomp_table()
    return {op: rule for op, rule in table.items() if getattr(op, "overloadpacket", None) not in products}


def compile_step(
    gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor], patches: Mapping[str, Any]
) -> Callable[[list[torch.Tensor]], Any]:
    """Compile a flat graph of operators for inputs like these. The result takes a list and checks nothing.

    It is called once per time step, where microseconds count. So it leaves out Inductor's checks of sizes and strides,
    and the wrapper that Inductor usually puts around a graph.
    """
    from torch._inductor.compile_fx import compile_fx_inner

    with torch.no_grad(), inductor_config.patch({**patches, "size_asserts": False, "alignment_asserts": False}):
        compiled = compile_fx_inner(gm, example_inputs, is_inference=True)
    return getattr(compiled, "current_callable", None) or compiled  # type: ignore[return-value]


class StepInCpp:
    """A flat graph of operators for inputs like these on a CPU, compiled with Inductor's C++ wrapper.

    ``address`` is that of a function ``void(handles of the arguments, handles of the results)``. It frees its
    arguments' handles, and the caller those of the results. The caller holds Python's lock.

    Raises:
        LookupError: the compiled code cannot be called this way.
        Exception: whatever Inductor raises for a graph that it cannot compile.
    """

    def __init__(
        self, gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor], patches: Mapping[str, Any]
    ) -> None:
        from torch._inductor.compile_fx import compile_fx_inner

        own = {"size_asserts": False, "alignment_asserts": False, "cpp_wrapper": True}
        with torch.no_grad(), inductor_config.patch({**patches, **own}):
            compiled: Any = compile_fx_inner(gm, example_inputs, is_inference=True, cpp_wrapper=True)
        if getattr(compiled, "constants", None):
            raise LookupError("the step has constants, which its Python caller would pass")
        # The Python function that Inductor puts around the C++ one. It keeps the library loaded.
        self._python = compiled.current_callable
        within = [cell.cell_contents for cell in getattr(self._python, "__closure__", None) or ()]
        paths = [getattr(getattr(inner, "__self__", None), "__file__", None) for inner in within]
        if len(paths) != 1 or paths[0] is None:
            raise LookupError("Inductor's C++ wrapper is not where it is expected")
        try:
            function = ctypes.PyDLL(paths[0])._Z19inductor_entry_implPP16AtenTensorOpaqueS1_
        except (AttributeError, OSError) as error:
            raise LookupError(f"the library of Inductor's C++ wrapper: {error}") from error
        self.address = ctypes.cast(function, ctypes.c_void_p).value


def tensor_handle(tensor: torch.Tensor) -> int:
    """The address by which C++ code compiled by Inductor knows a tensor. The caller frees it (`tensor_functions`)."""
    return _pointer(torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(tensor), None)  # type: ignore[no-any-return]


# A prototype of our own: others may set the types of ctypes.pythonapi's.
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


@functools.cache
def tensor_functions() -> tuple[Any, Any, Any]:
    """Torch's C functions that make a view of a tensor, copy a handle, and free a handle.

    Raises:
        AttributeError, OSError: this torch does not have them.
    """
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    library = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / name))
    found = library.aoti_torch__reinterpret_tensor, library.aoti_torch_new_tensor_handle
    library.aoti_torch_delete_tensor_object.argtypes = [ctypes.c_void_p]
    return *found, library.aoti_torch_delete_tensor_object


class AnyNumber:
    """Fake tensors whose first dimension is either the given number or any number from two on. The first part of
    ``description`` holds (shape without that dimension, stride, dtype, device) for these tensors. The second part holds
    (shape, stride, dtype, device) for tensors without that dimension. Strides are numbers: Inductor of torch 2.14 may
    use one that is a symbol without defining it.

    Compiling for them may compare that number with another one; :meth:`allows` says whether the result fits a number.
    """

    def __init__(self, description: tuple[Any, Any], number: int | None) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

        self._env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self._env)
        self._symbol = None
        first: Any = number
        if number is None:
            context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            first = self.mode.from_tensor(torch.empty(4), static_shapes=False, symbolic_context=context).shape[0]
            self._symbol = first.node.expr
        with_number, without = description
        given = [((first, *shape), *rest) for shape, *rest in with_number] + [*without]
        with self.mode:
            self.examples = [
                torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype, device in given
            ]

    def allows(self, number: int) -> bool:
        """Whether every comparison made so far has the same outcome for ``number``."""
        return all(bool(guard.expr.xreplace({self._symbol: number})) for guard in self._env.guards)


ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters
_compiled_here = threading.local()


@contextlib.contextmanager
def compilations_forgotten() -> Iterator[None]:
    """On leaving, drop what Dynamo compiled inside, in this thread, if ``torch.compile`` has no ``isolate_recompiles``.
    There Dynamo gives a function up after ``recompile_limit`` compilations, no matter who asked for them.
    """
    if ISOLATES:
        yield
        return
    _note_compilations()
    before, _compiled_here.codes = getattr(_compiled_here, "codes", None), []
    try:
        yield
    finally:
        made, _compiled_here.codes = _compiled_here.codes, before
        for code, compiled in made:
            for entry in eval_frame._debug_get_cache_entry_list(code):
                if entry.code is compiled:
                    _drop(entry.guard_manager)


@functools.cache
def _note_compilations() -> None:
    from torch._dynamo.convert_frame import register_bytecode_hook

    def note(code: Any, compiled: Any) -> None:
        if (codes := getattr(_compiled_here, "codes", None)) is not None:
            codes.append((code, compiled))

    register_bytecode_hook(note)  # never removed: another thread may be iterating over the hooks


def _drop(guards: Any) -> None:
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    deleted = DeletedGuardManagerWrapper("hwbp_compiler compiled this to look at it")
    # The entry stays in its list, where it never matches. Dynamo counts the entries that guard no object or the same
    # objects as the current frame. This one guards an object that no frame has.
    deleted.id_matched_objs = {"": object}
    guards.extra_state.invalidate(guards.cache_entry, deleted)


def counter() -> Counter[str]:
    """Our section of torch.compile's process-wide counters."""
    return _counters["highway"]


_Found = TypeVar("_Found")


def observed(graph: torch.fx.Graph, name: str, run: Callable[[torch.fx.Graph], _Found]) -> _Found | None:
    """``run(graph)`` under the observer that Inductor uses for its own passes. It is timed as ``pass.{name}`` and drawn
    if ``config.trace.log_url_for_graph_xform`` asks for it. Returns None without running if ``config.disabled_passes``
    names it.
    """
    return GraphTransformObserver(graph.owning_module, name).apply_graph_pass(run)  # type: ignore[arg-type]


def timed(name: str) -> AbstractContextManager[Any]:
    """Time a step as ``pass.{name}`` together with Dynamo's own (``torch._dynamo.utils.compile_times()``)."""
    return dynamo_timed(f"pass.{name}")


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Put ``text()`` into the structured trace as an artifact. ``text`` is not called if nothing records the trace."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def inductor_patches(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config patches that ``backend="inductor"`` would derive from ``mode`` and ``options``.

    Raises RuntimeError if Inductor refuses a key, the type of a value or the mode.
    """
    return torch._TorchCompileInductorWrapper(mode, options, None).config


def inductor_option_type(key: str) -> str:
    """The type that Inductor's config declares for ``key``, as readable text."""
    declared = inductor_config.get_type(key)
    plain = typing.get_origin(declared) is None and isinstance(declared, type)
    return declared.__name__ if plain else str(declared)


def inductor_setting(name: str, patches: Mapping[str, Any]) -> Any:
    """The value that a compilation under ``patches`` uses."""
    return patches[name] if name in patches else getattr(inductor_config, name)


def user_joint_passes(
    patches: Mapping[str, Any], which: str = "joint_custom_pre_pass"
) -> tuple[Callable[[torch.fx.Graph], Any], ...]:
    """The user's joint passes: those in ``patches``, or else those in Inductor's config."""
    chosen = inductor_setting(which, patches)
    if chosen is None:
        return ()
    # Newer releases also accept several passes; older ones accept one.
    return tuple(chosen) if isinstance(chosen, (list, tuple)) else (chosen,)


def recording_autograd() -> contextlib.AbstractContextManager[None]:
    """Let autograd record inside an operator's kernel, where it is normally off."""
    return _autograd(True)


def below_autograd() -> contextlib.AbstractContextManager[None]:
    """Run operators without autograd and without its bookkeeping of views and in-place changes. Many small operators
    then take a tenth of the time. Use it only for tensors that do not leave as views of one another.
    """
    return _autograd(False)


@contextlib.contextmanager
def _autograd(records: bool) -> Iterator[None]:
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        key = getattr(torch._C.DispatchKey, name)
        excluded = excluded.remove(key) if records else excluded.add(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.set_grad_enabled(records):
        yield


def config_is_per_thread() -> bool:
    """Whether Dynamo's config holds for this thread only (torch 2.13 and 2.14) or for all threads (2.11)."""
    entry = getattr(dynamo_config, "_config", {}).get("allow_rnn")
    return isinstance(getattr(entry, "user_override", None), ContextVar)


def allow_rnn(allowed: bool) -> bool:
    """Let Dynamo trace recurrent modules, or not. Returns the previous setting."""
    before: bool = dynamo_config.allow_rnn
    if before != allowed:
        dynamo_config.allow_rnn = allowed
    return before


def override_python_kernels(operator: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace every kernel that tracing uses for the composite ``operator`` by ``make(original)``."""
    for key, original in list(operator.py_kernels.items()):
        if callable(original):
            operator.py_kernels[key] = make(original)
    operator._dispatch_cache.clear()


def guard_composite(operator: Any, look: Callable[[], None]) -> None:
    """While tracing, call ``look()``, which may raise, before the composite ``operator``. This operator has no kernel
    in Python that :func:`override_python_kernels` could replace.
    """
    key = torch._C.DispatchKey.CompositeImplicitAutograd

    def guarded(*args: Any, **kwargs: Any) -> Any:
        look()
        return operator._op_dk(key, *args, **kwargs)

    operator.py_impl(key)(guarded)


# Attribute of a backend that holds a function returning a context. What the backend compiles runs in such a context.
RUNS_IN = "highway_context"


def configure_backend(
    backend: Callable[..., Any], prepare: Callable[..., Callable[[], contextlib.AbstractContextManager[Any]]]
) -> None:
    """Call ``prepare(mode=..., options=...)`` in every ``torch.compile`` that is given ``backend``. ``prepare`` returns
    a maker of contexts, and every call of the compiled result runs inside such a context. Another backend may have its
    own maker in the attribute ``RUNS_IN``.

    ``torch.compile`` passes options to a named backend only with the first graph, deep inside the first call of the
    model. But every backend goes through ``get_compiler_fn`` when ``torch.compile`` is called, so this function is
    replaced. Other backends are not affected.
    """
    original = eval_frame.get_compiler_fn

    @functools.wraps(original)
    def get_compiler_fn(compiler_fn: Any) -> Any:
        inner = compiler_fn.compiler_fn if isinstance(compiler_fn, torch._TorchCompileWrapper) else compiler_fn
        context = prepare(**getattr(compiler_fn, "kwargs", {})) if inner is backend else getattr(inner, RUNS_IN, None)
        found = original(compiler_fn)
        if context is not None:
            found.backend_ctx_ctor = context
        return found

    eval_frame.get_compiler_fn = get_compiler_fn


class _Registry(dict):  # type: ignore[type-arg]
    """torch's table of backends, in which ``ours`` may be registered any number of times.

    If several threads look a backend up for the first time, each of them registers it. Torch takes no lock and refuses
    all but one of them ("duplicate name"). Threads that wait for our import read the table after it.
    """

    def __init__(self, backends: Mapping[str, Any], ours: Callable[..., Any]) -> None:
        super().__init__(backends)
        self.ours = ours

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) and super().get(name) is not self.ours

    def __setitem__(self, name: str, backend: Any) -> None:
        if backend is not self.ours and super().get(name) is self.ours:
            raise AssertionError(f"duplicate name: {name}")
        super().__setitem__(name, backend)


def registered_by_any_thread(backend: Callable[..., Any]) -> None:
    """Allow ``backend`` to be registered more than once, with the same effect."""
    registry._COMPILER_FNS = _Registry(registry._COMPILER_FNS, backend)


def context_of(compiled: Any) -> Any:
    """The maker of contexts (see :func:`configure_backend`) for calls of ``compiled``, which is the result of
    ``torch.compile`` or a module whose ``compile`` was called. None if there is none.
    """
    inner = getattr(compiled, "_compiled_call_impl", None)
    found = getattr(getattr(compiled, "dynamo_ctx", None), "_backend_ctx_ctor", None)
    return found or getattr(compiled, "highway_context", None) or getattr(inner, "highway_context", None)


def watch_nested(backend: Callable[..., Any], seen: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Call ``seen(inner, outer)`` whenever Dynamo inlines one thing compiled for ``backend`` into another. The
    arguments are the mode and options given to each ``torch.compile``. Dynamo inlines as if the inner ``torch.compile``
    were not there.
    """
    context = eval_frame._TorchDynamoContext
    original = context.__call__

    @functools.wraps(original)
    def __call__(self: Any, fn: Any) -> Any:
        made = original(self, fn)
        if not isinstance(made, torch.nn.Module):
            made.highway_context = getattr(self, "_backend_ctx_ctor", None)
            made.highway_compiled = self
        inlined = getattr(made, "_torchdynamo_inline", None)
        if inlined is not None and _given(self, backend) is not None:

            @torch.compiler.assume_constant_result
            def look_at_function() -> None:
                look(self)

            @functools.wraps(inlined)
            def inline(*args: Any, **kwargs: Any) -> Any:
                look_at_function()
                return inlined(*args, **kwargs)

            made._torchdynamo_inline = inline
        return made

    def look(compiled: Any) -> None:
        inner, outer = _given(compiled, backend), _given(_backend_traced_for(), backend)
        if inner and outer is not None:  # without inner options nothing can be dropped
            seen(inner, outer)

    context.__call__ = __call__  # type: ignore[method-assign]
    _look_at_modules(look)


def _look_at_modules(look: Callable[[Any], None]) -> None:
    """Dynamo handles compiled modules separately and does not call a function around their forward. A module whose
    method ``compile`` was called is traced like any other.
    """
    from torch._dynamo.variables.builder import VariableBuilder

    original = VariableBuilder.wrap_module

    @functools.wraps(original)
    def wrap_module(self: Any, value: Any) -> Any:
        if isinstance(value, eval_frame.OptimizedModule):
            look(value.dynamo_ctx)
        elif in_place := getattr(value, "_compiled_call_impl", None):
            look(getattr(in_place, "highway_compiled", None))
        return original(self, value)

    VariableBuilder.wrap_module = wrap_module  # type: ignore[method-assign]


def _given(compiled: Any, backend: Callable[..., Any]) -> dict[str, Any] | None:
    """The mode and options of a ``torch.compile``; None if it is not for ``backend``."""
    for function in _unwrapped(compiled):
        if isinstance(function, torch._TorchCompileWrapper) and function.compiler_fn is backend:
            return dict(function.kwargs)
    return None


def watch_frames(convert: Callable[..., Any]) -> None:
    """From now on, Dynamo calls ``convert(original, converter, frame, cache_entry, frame_state)`` instead of
    ``original`` with the remaining arguments, for every frame that is not in its cache and for every backend.
    """
    original = convert_frame.CatchErrorsWrapper.__call__

    def around(self: Any, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        return convert(original, self, frame, cache_entry, frame_state)

    # Dynamo looks for the first frame outside its own file. These functions claim to be in that file so that it skips
    # them.
    for function in (around, convert):
        function.__code__ = function.__code__.replace(co_filename=convert_frame.__file__)
    convert_frame.CatchErrorsWrapper.__call__ = around  # type: ignore[method-assign]


def seen_codes() -> list[CodeType]:
    """The codes of all frames that Dynamo has seen since it was last reset."""
    return [code for seen in list(convert_frame.input_codes.seen) if (code := seen()) is not None]


def was_seen(code: CodeType) -> bool:
    return code in convert_frame.input_codes


def never_traced(code: CodeType) -> bool:
    """Whether Dynamo skips frames of ``code`` by rule, as it does for most of torch's own."""
    return trace_rules.check(code)


def in_an_isolated_region() -> bool:
    """Whether the running code was compiled with ``isolate_recompiles``."""
    return ISOLATES and torch._C._dynamo.eval_frame.get_eval_frame_isolate_recompiles_id() >= 0


def compiles_now() -> bool:
    """Whether ``torch.compile`` compiles what is called here, and lookups in Dynamo's cache are reported."""
    stance, switched_off = eval_frame._stance, dynamo_config.disable or dynamo_config.caching_precompile
    usual = stance.stance == "default" and not stance.skip_guard_eval_unsafe
    return usual and not switched_off and not torch._C._len_torch_dispatch_stack() and sys.exc_info()[0] is None


class CacheHits:
    """Counts the frames of this thread that are found in Dynamo's cache, from now until ``stop()``."""

    _lock = threading.Lock()
    _counting: list[CacheHits] = []
    _before: Callable[[bool], bool] | None = None

    def __init__(self) -> None:
        self.number, self.thread = 0, threading.get_ident()
        with self._lock:
            if not self._counting:
                CacheHits._before = set_guard_complete_hook(self._looked_up)
            self._counting.append(self)

    def stop(self) -> int:
        with self._lock:
            self._counting.remove(self)
            if not self._counting:
                set_guard_complete_hook(CacheHits._before)
        return self.number

    @classmethod
    def _looked_up(cls, hit: bool) -> bool:
        for each in list(cls._counting):
            each.number += hit and each.thread == threading.get_ident()
        return cls._before(hit) if cls._before is not None else hit


def ddp_cuts_graphs() -> bool:
    """Whether a DistributedDataParallel model is being compiled that Dynamo splits at bucket boundaries.

    Dynamo's DDP optimizer compiles one graph per bucket of gradients. False if the model fits into one bucket.
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


# Attribute of backends that can handle hwbp_compiler.recurrent.
SERVES = "serves_highway_recurrences"


# Attributes in which torch keeps a backend that it has wrapped.
_WRAPPED = (
    "callback",
    "compiler_fn",
    "_compiler_fn",
    "_torchdynamo_orig_backend",
    "_torchdynamo_orig_callable",
    "__wrapped__",
)


@torch.compiler.assume_constant_result
def serving_backend() -> bool:
    """While Dynamo traces: whether the graph goes to a backend of ours."""
    return _serves(_backend_traced_for())


def tracing_for_another_backend() -> bool:
    """Whether Dynamo is tracing, and not for a backend of ours."""
    backend = _backend_traced_for()
    return backend is not None and not is_for_us(backend)


def _backend_traced_for() -> Any:
    """The backend that Dynamo traces for; None if it is not tracing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.compiler_fn
    except (AttributeError, LookupError):
        return None


def is_for_us(converter: Any) -> bool:
    """Whether Dynamo uses ``converter`` to convert frames for a backend of ours."""
    return _serves(converter)


def _serves(backend: Any) -> bool:
    """Whether ``backend`` is one of ours, no matter how it is wrapped."""
    return any(getattr(function, SERVES, False) for function in _unwrapped(backend))


def _unwrapped(backend: Any) -> Iterator[Any]:
    """``backend`` and everything that it wraps."""
    todo, seen = [backend], set()
    while todo:
        function = todo.pop()
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        yield function
        todo += [getattr(function, name, None) for name in _WRAPPED]


def watch_graph_breaks(seen: Callable[[list[FrameSummary], str], None]) -> None:
    """From now on call ``seen(stack, error)`` whenever Dynamo breaks a graph for a backend of ours. ``stack`` holds the
    user's lines that led there, outermost first, and ``error`` is Dynamo's message. Does nothing if this torch has no
    such function.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    original = getattr(InstructionTranslatorBase, "log_graph_break", None)
    if original is None:
        return

    @functools.wraps(original)
    def log_graph_break(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(Exception):  # watching must not break anything else
            error = next(e for e in (*args, *kwargs.values()) if isinstance(e, Exception))
            if not getattr(error, "logged", False) and _serves(self.output.compiler_fn):
                seen(list(getattr(error, "real_stack", None) or ()), str(error))
        return original(self, *args, **kwargs)

    InstructionTranslatorBase.log_graph_break = log_graph_break  # type: ignore[method-assign]
