"""The one module that touches private names of torch, with the releases it was tried on.

Everything else in the project goes through the functions here, so that a new torch breaks one file,
and says so: ``check_torch`` names what is missing.
"""

import contextlib
import functools
import gc
import inspect
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from int8fx.errors import UserError
from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.kernels.forks import free_in_children

TRIED_ON = ("2.11.0", "2.13.0", "2.14.1")
MINIMUM = (2, 11)


def release() -> tuple[int, ...]:
    """Of torch: ``(2, 13)``."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def check_torch() -> None:
    """Raises:
    RuntimeError: this torch is too old, or lacks a private name that the backend stands on.
    """
    tried = ", ".join(TRIED_ON)
    if release() < MINIMUM:
        raise RuntimeError(
            f"int8fx needs torch >= {'.'.join(map(str, MINIMUM))} (tried on {tried}), "
            f"and this is torch {torch.__version__}"
        )
    try:
        from torch._dynamo.source import Source  # noqa: F401
        from torch._inductor import list_mode_options  # noqa: F401
        from torch._inductor.compile_fx import compile_fx  # noqa: F401
        from torch._inductor.decomposition import decompositions, fast_random_decomps  # noqa: F401
        from torch._inductor.lowering import make_fallback  # noqa: F401
        from torch._subclasses.fake_tensor import FakeTensor  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"int8fx was tried on torch {tried}; torch {torch.__version__} has changed a private "
            f"name that it stands on: {error}"
        ) from error


# --- Dynamo's graph ------------------------------------------------------------------------------


def source_name(placeholder: fx.Node) -> str | None:
    """Where Dynamo took an input from, as a Python expression: ``L['self']._modules['fc']...``."""
    source = getattr(placeholder, "_dynamo_source", None)
    return None if source is None else source.name


def source_owner(placeholder: fx.Node) -> tuple[Any, str, Any] | None:
    """While Dynamo compiles: the module that an input is a parameter of, its name there, and the
    outermost module that Dynamo reached it from; None for an input that is no parameter."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    parameter = r"(([LG]\['[^']+'\]).*)\._parameters\['([^']+)'\]"
    match = re.fullmatch(parameter, source_name(placeholder) or "")
    if match is None:
        return None
    owner, root, name = match.groups()
    output = InstructionTranslator.current_tx().output
    scope = {"L": output.local_scope, "G": output.global_scope, "__builtins__": {}}
    return eval(owner, scope), name, eval(root, scope)


def mark_as_weight(placeholder: fx.Node) -> None:
    """Makes a placeholder that Dynamo did not make look like a parameter to AOTAutograd.

    Without a source, AOTAutograd installs no guard for it; "unguarded" counts it among the inputs
    whose address does not change from call to call, which is what CUDA graphs ask.
    """
    placeholder._dynamo_source = None  # type: ignore[attr-defined]
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def autocast_regions(graph: fx.Graph) -> dict[fx.Node, tuple[tuple, ...]]:
    """For each node the arguments of the autocasts that the graph has entered there, in order."""
    from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

    regions: dict[fx.Node, tuple[tuple, ...]] = {}
    entered: dict[fx.Node, tuple] = {}
    for node in graph.nodes:
        if node.target is _exit_autocast:
            entered.pop(node.args[0], None)
        regions[node] = tuple(entered.values())
        if node.target is _enter_autocast:
            entered[node] = tuple(node.args)
    return regions


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graphs, nested ones included, may be rewritten; tensors are shared.

    Dynamo keeps its own graph to compare and to fall back on, and its placeholders carry
    attributes that ``copy.deepcopy`` drops or, worse, copies (a ``grapharg`` holds real tensors).
    """
    copied = fx.GraphModule(gm, _copy_graph(gm.graph), gm.__class__.__name__)
    copied.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_backend_id", "dynamo_flat_name_to_original_fqn"):
        if hasattr(gm, name):
            setattr(copied, name, getattr(gm, name))
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, copy_graph_module(child))
    return copied


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph(tracer_cls=graph._tracer_cls)
    environment: dict[fx.Node, fx.Node] = {}
    result = copied.graph_copy(graph, environment)
    copied.output(result)
    output = copied.output_node()
    output.meta = dict(graph.output_node().meta)
    for old, new in environment.items():
        new.meta = dict(old.meta)
        # It refers to the real tensor, which nn.Module.to cannot swap then. Dynamo drops its own.
        new.meta.pop("grapharg", None)
        for attribute in ("_dynamo_source",):
            if hasattr(old, attribute):
                setattr(new, attribute, getattr(old, attribute))
    copied._codegen = graph._codegen
    return copied


def trace_operators_of_dynamic_shape() -> None:
    """Lets Dynamo trace operators whose result's size only the data tells, and not break the graph."""
    import torch._dynamo

    torch._dynamo.config.capture_dynamic_output_shape_ops = True


def fake_mode_of(values: Iterable[Any]) -> Any:
    """The mode of the fake tensors that annotate Dynamo's graph, or None.

    Not the tracing context's: Dynamo renews that one before it calls a backend.
    """
    return next((value.fake_mode for value in values if is_fake(value)), None)


def as_static_input(tensor: Tensor) -> Tensor:
    """A tensor that Dynamo has not seen, as an example input whose sizes are constants.

    AOTAutograd would make the sizes of a real one symbols, which then turn up in guards without a
    source to check them against.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return tensor
    return context.fake_mode.from_tensor(tensor, static_shapes=True)


def is_fake(value: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def is_level_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a level of ``torch.func``, and is gone with it."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@contextlib.contextmanager
def levels_left() -> Iterator[None]:
    """Leaves the levels of ``torch.func`` that what runs inside has entered, when it fails.

    AOTAutograd runs a graph to trace it. An error on the way would leave its levels entered, and every
    call after it, compiled or not, would run inside them.
    """
    from torch.autograd import forward_ad

    functorch, autograd = torch._C._functorch, torch._C._autograd
    depth, dual_level = functorch.get_dynamic_layer_stack_depth(), forward_ad._current_level
    inplace_allowed = functorch.get_inplace_requires_grad_allowed()
    hooks_refused = autograd._saved_tensors_hooks_get_disabled_error_message()
    forward_enabled = torch._C._is_fwd_grad_enabled()
    try:
        yield
    except BaseException:
        if dual_level < 0:  # a graph enters the only one that there can be
            with contextlib.suppress(RuntimeError):  # it was not entered
                torch._C._exit_dual_level(level=0)
        functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        functorch.set_inplace_requires_grad_allowed(inplace_allowed)
        if hooks_refused is None:
            autograd._saved_tensors_hooks_enable()
        torch._C._set_fwd_grad_enabled(forward_enabled)
        raise


def refuse_tangents(args: Sequence[Any]) -> None:
    """Raises:
    RuntimeError: an argument is a dual tensor of forward-mode AD: compiled code would drop its tangent.
    """
    from torch.autograd import forward_ad

    if forward_ad._current_level < 0:
        return
    for value in args:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                "forward-mode AD cannot go through a graph that llmint8 compiled: call torch.func.jvp "
                "inside the compiled function, or run the model eagerly"
            )


def uncompiled(model: Any) -> Any:
    """The module that ``torch.compile`` wrapped, or the callable itself."""
    from torch._dynamo.eval_frame import OptimizedModule

    return model._orig_mod if isinstance(model, OptimizedModule) else model


def requests(backend: Callable[..., Any]) -> frozenset[int]:
    """The calls of ``torch.compile`` with a backend since Dynamo's last reset, by an identity each."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    if eval_frame is None:
        return frozenset()
    return frozenset(key for key, each in eval_frame.cached_backends.items() if _is(each, backend))


def _is(request: Any, backend: Callable[..., Any]) -> bool:
    return getattr(request, "compiler_fn", request) is backend  # torch.compile's own wrapper has one


def is_wrapped(module: Any, backend: Callable[..., Any]) -> bool:
    """Whether ``torch.compile(module, backend=...)`` returned a wrapper that is still there.

    The module does not know, so this looks through all objects of the process.
    """
    from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

    wrappers: Any = [each for each in gc.get_objects() if type(each) is OptimizedModule]
    return any(
        wrapper._orig_mod is module and _is(innermost_backend(wrapper.dynamo_ctx.callback), backend)
        for wrapper in wrappers
    )


def compiled_modules(backend: Callable[..., Any]) -> list[nn.Module]:
    """The modules that ``torch.compile`` wrapped for a backend, and those compiled in place."""
    from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

    found = []
    objects: Any = gc.get_objects()
    for each in objects:
        if type(each) is OptimizedModule:
            callback: Any = each.dynamo_ctx.callback
            if _is(innermost_backend(callback), backend):
                found.append(each._orig_mod)
        # By its type: other packages' proxies answer isinstance by an import, or by an error.
        elif issubclass(type(each), nn.Module) and is_compiled(each):
            found.append(each)
    return found


def is_compiled(module: Any) -> bool:
    """Whether a module's own calls are: after ``module.compile()``, or with a compiled ``forward``."""
    return module._compiled_call_impl is not None or hasattr(
        getattr(module, "forward", None), "_torchdynamo_orig_callable"
    )


def is_compiled_for(module: Any, backend: Callable[..., Any]) -> bool:
    """Whether a module is what ``torch.compile`` returned for a backend, or is compiled in place.

    A module that is compiled in place does not tell for which: it counts where the backend was asked
    for.
    """
    from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

    if type(module) is OptimizedModule:
        callback: Any = module.dynamo_ctx.callback
        return _is(innermost_backend(callback), backend)
    in_place = isinstance(module, nn.Module) and module._compiled_call_impl is not None
    return in_place and bool(requests(backend))


@dataclass(frozen=True)
class Request:
    """What ``torch.compile`` was asked for."""

    backend: Any
    dynamic: bool | None


def request_in_place(module: Any) -> Request | None:
    """By which a module's own calls are compiled: ``module.compile()``, or a compiled ``forward``."""
    from torch._dynamo.eval_frame import innermost_backend

    calls: tuple[Any, ...] = module._compiled_call_impl, getattr(module, "forward", None)
    for call in calls:
        if hasattr(call, "_torchdynamo_orig_callable") and "self" in call.__code__.co_freevars:
            request = call.__closure__[call.__code__.co_freevars.index("self")].cell_contents
            asked: Any = innermost_backend(request.callback)
            return Request(getattr(asked, "compiler_fn", asked), request._dynamic)
    return None


def before_export(callback: Callable[[Any], None]) -> None:
    """Calls a function with each module that ``torch.export`` is given, before it is exported."""
    from torch.export import _trace

    trace: Any = _trace
    export = trace._export

    @functools.wraps(export)
    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        callback(module)
        return export(module, *args, **kwargs)

    trace._export = call


@functools.cache
def _error_of_dynamo(kind: type[Exception]) -> type[Exception]:
    """A kind of error that Dynamo hands on, and does not wrap into ``BackendCompilerFailed``."""
    from torch._dynamo.exc import ShortenTraceback

    return type(kind.__name__, (ShortenTraceback, kind), {"__module__": kind.__module__})


def raised_as_it_is(error: Exception) -> Exception:
    """An error that a backend raises for whoever calls the compiled model to read: of its own type and
    words, and without Dynamo's frames between the call and the backend."""
    made: Any = _error_of_dynamo
    return made(type(error))(str(error), first_useful_frame=sys._getframe(1))


def compile_apart(
    model: Callable[..., Any], backend: str | Callable[..., Any], fullgraph: bool = False
) -> Callable[..., Any]:
    """``torch.compile`` with static shapes, in a cache that nobody else's compiles are in.

    What the user compiled of the model stays as it is and counts against no limit of ours: Dynamo
    keeps what it compiled by code object, so the function that calls the model gets a new one; frames
    after a graph break, whose code is the model's, are told apart by ``isolate_recompiles``. A release
    without it (2.11, 2.12) keeps those beside the user's, and its backend check tells them apart.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    def handed_on(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        assert callable(backend)
        try:
            return backend(gm, inputs)
        except UserError as error:
            raise raised_as_it_is(error) from None

    apart = types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
    isolated = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"isolate_recompiles": True} if isolated else {}
    if fullgraph:
        options["fullgraph"] = True
    called = backend if isinstance(backend, str) else handed_on
    return torch.compile(apart, backend=called, dynamic=False, **options)


def not_one_graph() -> tuple[type[Exception], ...]:
    """What Dynamo raises where ``fullgraph`` is asked for and a model gives no graph for all sizes."""
    from torch._dynamo.exc import TorchDynamoException
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    return TorchDynamoException, ConstraintViolationError


def current_compile() -> tuple[str, int]:
    """Inside a backend: the id of this compile, and how often its frame was compiled before."""
    found = torch._guards.CompileContext.current_compile_id()
    return str(found), (found.frame_compile_id or 0) if found is not None else 0


def recompile_reasons() -> dict[str, str]:
    """Why Dynamo compiled a frame again, by the id of the compile; of its last compiles only."""
    from torch._dynamo.utils import get_compilation_metrics

    return {
        str(each.compile_id): each.recompile_reason
        for each in get_compilation_metrics()
        if each.recompile_reason
    }


def graph_break_reasons() -> list[tuple[str, str]]:
    """All graph breaks of this process since Dynamo's last reset: why, and at which line."""
    from torch._dynamo.output_graph import graph_break_reasons as reasons

    return [(each.reason, _place(each.user_stack)) for each in reasons]


def _place(stack: Sequence[Any]) -> str:
    return f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "unknown place"


def flop_counter() -> Any:
    """A context that counts the FLOPs of what runs in it, with a CPU's fused attention."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
        return sdpa_flop_count(query, key, value)

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: attention})


def recompile_limit(count: int) -> Any:
    """A context in which one function may be compiled so often."""
    return torch._dynamo.config.patch(recompile_limit=count)


def mark_dynamic(tensor: Tensor, dimension: int, least: int, most: int) -> None:
    """Makes a size of a tensor one that varies, between two bounds, in what is compiled next."""
    torch._dynamo.mark_dynamic(tensor, dimension, min=least, max=most)


def maybe_mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """The same, of a size that may prove to be one number."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def compile_counts() -> tuple[int, int]:
    """How many graphs Dynamo compiled in this process, and how often it broke one off."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


# --- What a call does to tensors -----------------------------------------------------------------


def new_fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_higher_order(target: Any) -> bool:
    return isinstance(target, torch._ops.HigherOrderOperator)


def leaves(values: Any) -> list[Any]:
    """What a nest of lists, tuples and dicts holds."""
    from torch.utils._pytree import tree_leaves

    return tree_leaves(values)


def fake_copy(tensor: Tensor) -> Tensor:
    """In a fake mode: a tensor of the same form, in memory of its own."""
    if is_wrapper(tensor):
        inner, context = held_by(tensor)
        inner = map_tensors(Tensor, fake_copy, inner)
        form = tensor.shape, tensor.stride()
        return type(tensor).__tensor_unflatten__(inner, context, *form)  # type: ignore[attr-defined]
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that holds its values in other tensors."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return is_traceable_wrapper_subclass(tensor)


def held_by(wrapper: Any) -> tuple[dict[str, Any], Any]:
    """What a wrapper holds, tensors mostly (of a DTensor the mesh as well), and what else it knows."""
    names, context = wrapper.__tensor_flatten__()
    return {name: getattr(wrapper, name) for name in names}, context


def untyped_storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Where a tensor's values are, of a wrapper those of the tensors that it holds."""
    if is_wrapper(tensor):
        for inner in held_by(tensor)[0].values():
            if isinstance(inner, Tensor):
                yield from untyped_storages(inner)
    else:
        yield tensor.untyped_storage()


def storages(values: Any) -> frozenset[int]:
    """The identities of the storages behind all tensors of a nest."""
    tensors = (value for value in leaves(values) if isinstance(value, Tensor))
    return frozenset(storage._cdata for tensor in tensors for storage in untyped_storages(tensor))


@contextlib.contextmanager
def ignoring_new_symbols(fake_mode: Any) -> Iterator[None]:
    """Sizes that depend on data, of calls that are made once more, are not sizes of the graph."""
    if fake_mode.shape_env is None:
        yield
    else:
        with fake_mode.shape_env.ignore_fresh_unbacked_symbols():
            yield


def running_anew(fake_mode: Any) -> Any:
    """Operators run, and are not answered from the fake mode's cache: of one that gives a tensor other
    memory the cache knows its result alone."""
    from torch._subclasses.fake_tensor import disable_fake_tensor_cache

    return disable_fake_tensor_cache(fake_mode)


class _WriteRecorder(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_higher_order(func):
            self.written |= storages((args, kwargs))
            return func(*args, **kwargs)
        arguments = func._schema.arguments
        given = dict(zip((each.name for each in arguments), args, strict=False)) | kwargs
        written = [each.name for each in arguments if each.alias_info and each.alias_info.is_write]
        # Of all operators those of batch norms write to what they do not declare.
        if any(given.get(flag) for flag in ("training", "train", "use_input_stats")):
            written += ("running_mean", "running_var")
        # Sparse tensors have no storage to name.
        with contextlib.suppress(NotImplementedError):
            self.written |= storages([given.get(name) for name in written])
        return func(*args, **kwargs)


@contextlib.contextmanager
def recording_writes() -> Iterator[set[int]]:
    """The identities of the storages that operators write to in the ``with`` block."""
    with _WriteRecorder() as recorder:
        yield recorder.written


# --- Inductor ------------------------------------------------------------------------------------


def list_mode_options(mode: str) -> dict[str, Any]:
    from torch._inductor import list_mode_options as of_inductor

    return of_inductor(mode)


def inductor_config() -> dict[str, Any]:
    """Inductor's configuration entries by name."""
    from torch._inductor import config

    return config.get_config_copy()


def tunes(patches: dict[str, Any]) -> bool:
    """Whether Inductor tries configurations out, under patches of its configuration."""
    from torch._inductor import config

    return bool(patches.get("max_autotune", config.max_autotune))


def writes_cpp_wrapper(patches: dict[str, Any]) -> bool:
    """Whether Inductor calls its kernels from C++, under patches of its configuration."""
    from torch._inductor import config

    return bool(patches.get("cpp_wrapper", config.cpp_wrapper))


@contextlib.contextmanager
def _cache_tag(tag: str) -> Iterator[None]:
    # Inductor's and AOTAutograd's caches key on the graph, not on the decompositions that we add.
    config: Any = torch.compiler.config  # its patch() is added when it is installed
    with config.patch(cache_key_tag=config.cache_key_tag + tag):
        yield


def compile_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    patches: dict[str, Any],
    decompositions: dict[Any, Callable[..., Any]],
    cache_tag: str,
) -> Callable[..., Any]:
    """AOTAutograd and Inductor on a graph of Dynamo's kind, with operators of ours decomposed."""
    from torch._inductor.compile_fx import compile_fx

    _register_decompositions(decompositions)
    with _cache_tag(cache_tag):
        compiled: Any = compile_fx(gm, list(inputs), config_patches=patches)
    return compiled


AHEAD = (2, 13)


def check_ahead() -> None:
    """Raises:
    UserError: for the mask of a prompt of any length, this torch's Inductor writes C++ that uses an
        index before it declares it.
    """
    if release() < AHEAD:
        raise UserError(
            f"int8fx compile needs torch >= {'.'.join(map(str, AHEAD))}, and this is torch "
            f"{torch.__version__}, which writes C++ that does not compile; torch.compile works"
        )


def compile_ahead(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    patches: dict[str, Any],
    decompositions: dict[Any, Callable[..., Any]],
    folder: Path,
    name: str,
) -> list[Path]:
    """AOTInductor on a graph of Dynamo's kind: what it wrote into a folder.

    Its library is among the files, and the list of operators that torch's C interface lacks.

    Args:
        inputs: fake ones; a size that varies is a symbol.
        name: that the files begin with.
    """
    from torch._inductor.compile_fx import compile_fx_aot

    _register_decompositions(decompositions)
    patches = patches | {
        "aot_inductor.package": True,
        "aot_inductor.output_path": str(folder),
        "aot_inductor.model_name_for_generated_files": name,
    }
    # Dynamo has renewed the mode of its own context meanwhile, and two do not mix.
    with apart_from_dynamo(fake_mode_of(inputs)), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of what it is about to drop
        written: Any = compile_fx_aot(gm, list(inputs), config_patches=patches)
    return [Path(each) for each in written if isinstance(each, str)]


def sizes_as_calls(gm: fx.GraphModule) -> None:
    """Replaces the inputs of a graph that are sizes of its other inputs: AOTInductor takes tensors."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = {node: node.meta["example_value"] for node in placeholders}
    tensors = [node for node in placeholders if isinstance(values[node], Tensor)]
    for node in placeholders:
        if not isinstance(values[node], torch.SymInt):
            continue
        owner, dim = next(
            (each, dim)
            for each in tensors
            for dim, size in enumerate(values[each].shape)
            if isinstance(size, torch.SymInt) and size.node.expr == values[node].node.expr
        )
        with gm.graph.inserting_after(placeholders[-1]):
            size = gm.graph.call_function(torch.ops.aten.sym_size.int, (owner, dim))
        size.meta["example_value"] = values[node]
        node.replace_all_uses_with(size)
        gm.graph.erase_node(node)
    gm.recompile()


@contextlib.contextmanager
def without_guards(fake_mode: Any) -> Iterator[None]:
    """Decisions by the sizes of the example hold for all sizes, since the result is right for all."""
    if fake_mode is None or fake_mode.shape_env is None:
        yield
    else:
        with fake_mode.shape_env.suppress_guards():
            yield


def length_now(size: torch.SymInt) -> int | None:
    """What a size that varies is in the call that is compiled for; None: that is not known."""
    node = size.node
    return int(node.hint) if node.has_hint() else None


class _Constants(TorchDispatchMode):
    """Sees tensors that are made of numbers: torch lifts each into the graph by an operator. Inductor
    writes out those of few numbers."""

    FEW = 8
    LIFTED = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in self.LIFTED:
            self.seen |= args[0].dim() > 1 or args[0].numel() > self.FEW
        return func(*args, **(kwargs or {}))


def makes_constants(fake_mode: Any, gm: fx.GraphModule, values: Sequence[Any]) -> bool:
    """Whether a graph makes tensors of more than a few numbers. Inductor of torch 2.13 does not define
    them where the graph is called as a body of another."""
    constants = _Constants()
    with fake_mode, constants, torch.no_grad():
        fx.Interpreter(gm).run(*values)
    return constants.seen


def size_conditions(fake_mode: Any) -> list[str]:
    """What was decided of the sizes of a graph so far: Dynamo checks at each call what was there when
    the backend was done."""
    shape_env = None if fake_mode is None else fake_mode.shape_env
    return [] if shape_env is None else [str(each.expr) for each in shape_env.guards]


def operator_named(name: str) -> Any:
    """The operator ``namespace::name.overload`` that Python knows; ``.overload`` may be missing."""
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def has_cpu_kernel(operator: Any) -> bool:
    """Whether an operator is implemented for a CPU by itself, which those of int8fx are in C++."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CPU")


@contextlib.contextmanager
def compiling_alone() -> Iterator[None]:
    """Inductor compiles in this thread, and asks no pool of workers."""
    from torch._inductor import config

    with config.patch(compile_threads=1):
        yield


@contextlib.contextmanager
def apart_from_dynamo(fake_mode: Any) -> Iterator[None]:
    """For a compile outside of a backend, on fake inputs of this mode: the same twice has one key."""
    with torch._guards.tracing(torch._guards.TracingContext(fake_mode)):
        yield


def subgraph_call() -> Any:
    """The operator ``(body, name, *operands) -> results``; of one name Inductor compiles one body."""
    from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

    return invoke_subgraph


def enables_grad(graph: torch.fx.Graph) -> bool:
    """Whether a graph has a region of ``torch.enable_grad()``."""
    modes = graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    return any(mode.args[0] for mode in modes)


def below_autograd(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, for a call that no backward pass follows.

    Operators with a gradient formula in Python (ours) are otherwise dispatched through Python, to find
    out at each call that no gradient is wanted: 17 us instead of 6 for a small linear.
    """
    guard = torch._C._AutoDispatchBelowAutograd

    def call(*args: Any) -> Any:
        with guard():
            return compiled(*args)

    return call


# --- Compiled functions in files -----------------------------------------------------------------


@functools.cache
def declare_serializable(kind: type) -> None:
    """Tells Dynamo that callables of a class can be written to a file, as it asks of a compiled graph.

    A base class of Dynamo's would import all of Dynamo wherever int8fx is imported.
    """
    from torch._dynamo.aot_compile_types import SerializableCallable

    SerializableCallable.register(kind)


def serialize_compiled(compiled: Any) -> bytes:
    """What ``compile_with_inductor`` returned, as bytes.

    Raises:
        RuntimeError: it was not compiled for a file, so that parts of it are gone.
    """
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

    if getattr(compiled, "serialize", None) is None:
        raise RuntimeError("a compiled graph can be saved where torch.compile(f).aot_compile made it")
    bundled = BundledAOTAutogradSerializableCallable(compiled)
    return BundledAOTAutogradSerializableCallable.serialize_compile_artifacts(bundled)


def deserialize_compiled(data: bytes) -> Callable[..., Any]:
    """The way back."""
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

    return BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts(data)


def _register_decompositions(ours: dict[Any, Callable[..., Any]]) -> None:
    """Adds to Inductor's own table, once.

    ``compile_fx`` takes a table as an argument, too, but that becomes part of the cache's key, which
    cannot be pickled then: every compile would bypass the cache.

    A decomposition may return NotImplemented for some devices. The operator is then called as it is,
    for which Inductor asks to be told: by itself it takes an operator with both for a mistake.
    """
    from torch._inductor import decomposition as inductor
    from torch._inductor.lowering import make_fallback

    if not ours.keys() <= inductor.decompositions.keys():
        for operator in ours:
            make_fallback(operator, warn=False, override_decomp=True)
        inductor.decompositions.update(ours)
        inductor.fast_random_decomps.cache_clear()  # a copy of the table


# --- Tensor subclasses ---------------------------------------------------------------------------


# Makes torch functions of a subclass arrive as the aten operators that they are made of.
without_torch_functions: Any = torch._C._disabled_torch_function_impl


def new_wrapper(cls: type, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a subclass, without memory of its own. Contiguous when ``stride`` is None.

    C++ code that asks for its data, past the subclass, gets an error with ``cls.NO_DATA``.
    """
    # Autograd makes views of it where a caller is in inference mode, too.
    with torch.inference_mode(False):
        make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        wrapper = make(cls, shape, strides=stride, dtype=dtype, device=device)
    _forbid_data_access(wrapper)
    return wrapper


_sharing = free_in_children(threading.RLock())


def _forbid_data_access(wrapper: Any) -> None:
    # Nobody reads data on the meta device.
    if wrapper.is_meta or cpu.forbid_data_access(storage_id(wrapper), wrapper.NO_DATA):
        return
    torch._C._set_throw_on_mutable_data_ptr(wrapper)  # in torch's words, and not to all that reads


def out_of_inference_mode(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that autograd may save, and that counts its versions."""
    if type(tensor) is not Tensor or not tensor.is_inference():
        return tensor
    form = tensor.storage_offset(), tensor.shape, tensor.stride()
    with torch.inference_mode(False):
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            tensor.untyped_storage(), *form
        )


def is_loaded(tensor: Tensor) -> bool:
    """Whether a tensor's values are there: ``torch.load`` of its old format reads them at the end."""
    return not hasattr(tensor.untyped_storage(), "_torch_load_uninitialized")


def swap_despite_references(kind: Any) -> None:
    """Makes ``torch.utils.swap_tensors`` swap tensors of a kind, whoever refers to them.

    ``Module.to`` and its like put what they made of a parameter in its place by it. It refuses tensors
    with weak references, which Dynamo's guards and users hold, and tensors that a graph of autograd
    holds. A weak reference goes on to refer to the same Python object, and a graph to the values that
    it saved, which is right for tensors that never require grad.
    """
    swap_others = torch.utils.swap_tensors

    @functools.wraps(swap_others)
    def swap_tensors(t1: Any, t2: Any) -> None:
        if not (type(t1) is kind and type(t2) is kind):
            return swap_others(t1, t2)
        torch._C._swap_tensor_impl(t1, t2)
        t1.__dict__, t2.__dict__ = t2.__dict__, t1.__dict__

    torch.utils.swap_tensors = swap_tensors


def before_swaps(let_go: Callable[[Any], None]) -> None:
    """Makes ``torch.utils.swap_tensors`` call ``let_go`` on both tensors first.

    ``Module.to`` and its like end there under ``set_swap_module_params_on_conversion``.
    """
    swap = torch.utils.swap_tensors

    @functools.wraps(swap)
    def swap_tensors(t1: Any, t2: Any) -> None:
        let_go(t1)
        let_go(t2)
        swap(t1, t2)

    torch.utils.swap_tensors = swap_tensors


def with_aliasing_of(func: Any, args: tuple, kwargs: dict, out: Any) -> Any:
    """``out``, a wrapper, known to torch as the view of ``args[0]`` that ``func`` declares it to be."""
    from torch.utils._python_dispatch import return_and_correct_aliasing

    # What makes them share a storage looks at the data of both. Threads may share a weight.
    with _sharing:
        for wrapper in (args[0], out):
            cpu.forbid_data_access(storage_id(wrapper), None)
        try:
            return return_and_correct_aliasing(func, args, kwargs, out)
        finally:
            _forbid_data_access(args[0])


def map_tensors(kind: type, function: Callable[[Any], Any], values: Any) -> Any:
    """A nest of lists, tuples and dicts with ``function`` applied to what is of a type in it."""
    from torch.utils._pytree import tree_map_only

    return tree_map_only(kind, function, values)


def persistent_tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module that its ``state_dict`` holds, by every name they have."""
    yield from module.named_parameters(remove_duplicate=False)
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), buffer


def reads_through(module: Any, hook: Any) -> bool:
    """Whether ``hook`` is among what a module calls before it loads a ``state_dict``."""
    registered = module._load_state_dict_pre_hooks.values()
    return any(getattr(each, "hook", each) is hook for each in registered)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to in place, as far as torch counts.

    Inference tensors count no versions: 0.
    """
    return 0 if tensor.is_inference() else tensor._version


def storage_id(tensor: Tensor) -> int:
    """The identity of a tensor's storage object: it changes when ``.data`` is replaced."""
    return tensor.untyped_storage()._cdata


class StorageReference:
    """A weak reference to a tensor's storage: keeps its identity from being reused, not its bytes."""

    def __init__(self, tensor: Tensor) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        self._reference = StorageWeakRef(tensor.untyped_storage())

    @property
    def id(self) -> int:
        return self._reference.cdata

    @property
    def expired(self) -> bool:
        return self._reference.expired()


class WeakView:
    """A tensor, for as long as somebody else keeps its storage."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageReference(tensor)
        self._form = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._empty = tensor.new_empty(0)

    def tensor(self) -> Tensor | None:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.id)
        return None if storage is None else self._empty.new_empty(0).set_(storage, *self._form)


# --- FSDP2 ---------------------------------------------------------------------------------------


def fsdp_shards(model: Any) -> dict[int, Any]:
    """What FSDP2 keeps of each parameter of a model, by the identity of its sharded form."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it no model can be in shards
    if fsdp is None:
        return {}
    states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
    groups = [group for state in states for group in state._fsdp_param_groups]
    return {id(shard.sharded_param): shard for group in groups for shard in group.fsdp_params}


def was_gathered(shard: Any) -> bool:
    """Whether FSDP2 has put a parameter together before, and keeps the form that it then had."""
    return hasattr(shard, "_unsharded_param")


def replace_shard(shard: Any, parameter: Any) -> None:
    """Makes FSDP2 take another parameter, before the first call."""
    shard.sharded_param = parameter
    # What it held gives its memory back; FSDP2 pads the new one before the first call.
    shard._sharded_param_data = parameter.to_local().new_zeros(0)


# --- several processes ----------------------------------------------------------------------------


def all_reduced(tensor: Tensor, how: str, group: str) -> Tensor:
    """``"sum"`` or ``"max"`` over a group of processes by its name, in a graph as well."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(tensor.contiguous(), how, group))


def is_first(group: str) -> bool:
    """Whether this is the first process of a group."""
    name: Any = group  # torch has a type for such strings
    return torch.distributed.distributed_c10d._resolve_process_group(name).rank() == 0
