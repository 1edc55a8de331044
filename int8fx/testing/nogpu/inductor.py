"""Inductor's CUDA output, made and executed on a machine without a GPU.

    fake_cuda.install("H100")
    with retargeted() as wrappers:
        y = torch.compile(model)(x_on_cpu)

Inside the ``with`` block, whatever reaches Inductor is compiled for ``cuda:0`` with fake CUDA tensors
in the place of its inputs. What Inductor generates is kept (``wrappers``), and a twin of it runs: the
same wrapper, allocating on the CPU, its Triton kernels (Inductor's own and the user's) in the
interpreter, the calls to other operators by CPU kernels. So ``y`` is what the generated code computes.

Not seen in this way: races between programs (``order.py`` is for these), reads out of bounds (see
``guard.py``), contraction into FMA, approximate division.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from . import fake_cuda
from .interpreter import interpret

_KERNEL_SOURCE = re.compile(
    r"async_compile\.triton\('\w+', '''.*?''', device_str='cuda'\)", flags=re.DOTALL
)
_TO_CPU = (
    ("torch._C._dynamo.guards._empty_strided_cuda", "torch._C._dynamo.guards._empty_strided_cpu"),
    ("device(type='cuda', index=0)", "device(type='cpu')"),
    ("device='cuda:0'", "device='cpu'"),
    ("device='cuda'", "device='cpu'"),
)


@dataclass
class Launch:
    """One kernel launch, as it happened.

    Attributes:
        kernel: its ``@triton.jit`` function.
        arguments: by name, constants included; the tensors are those that the kernel works on.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def run(self, **changed: Any) -> None:
        """Runs it again, with some arguments changed."""
        interpret(self.kernel)[self.grid](**(self.arguments | changed))


Observer = Callable[[Launch], None]


class NotExecuted(Exception):
    """Raised by the call of a wrapper that was only to be generated."""


class Kernel:
    """Stands where a wrapper expects Inductor's ``CachingAutotuner``, and interprets."""

    def __init__(self, name: str, source: str, observe: Observer | None) -> None:
        from torch._inductor.codecache import PyCodeCache

        self.name = name
        self.source = source
        self.autotuner = getattr(PyCodeCache.load(source), name)
        self._observe = observe

    @property
    def configs(self) -> Sequence[Any]:
        return self.autotuner.configs

    def run(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        from torch._inductor.runtime.triton_heuristics import GridExpr

        tuner, config = self.autotuner, self.configs[0]
        constants = self._constants(config)
        extra = tuner.inductor_meta.get("extra_launcher_args", ())
        names = [name for name in tuner.fn.arg_names if name not in constants]
        if len(args) != len(names) + len(extra):
            raise TypeError(f"{self.name} takes {(*names, *extra)}, and was given {len(args)}")
        values = dict(zip((*names, *extra), args, strict=True))
        # An argument that the launcher folded to a constant is still passed by the wrapper.
        grid = GridExpr.from_meta(tuner.inductor_meta, config).eval_slow(values)
        arguments = {name: values[name] for name in names} | constants
        launch = Launch(tuner.fn, tuple(map(int, grid)), arguments)
        launch.run()
        if self._observe is not None:
            self._observe(launch)

    def _constants(self, config: Any) -> dict[str, Any]:
        """The arguments that the kernel's launcher, and not its caller, supplies."""
        from torch._inductor.runtime.triton_helpers import get_constexprs

        tuner = self.autotuner
        constexprs = {tuner.fn.arg_names[index] for index in get_constexprs(tuner.fn)}
        given = dict(tuner.triton_meta.get("constants", {})) | config.kwargs
        given |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return {name: value for name, value in given.items() if name in constexprs}

    def __getattr__(self, name: str) -> Any:
        if name == "autotuner":
            raise AttributeError(name)
        return getattr(self.autotuner, name)


@dataclass
class Wrapper:
    """What Inductor generated for one graph.

    Attributes:
        code: the wrapper's source, unmodified.
        kernels: its Triton kernels.
    """

    code: str
    kernels: list[Kernel]

    @property
    def body(self) -> str:
        """The source without that of the kernels, and without comments."""
        lines = _KERNEL_SOURCE.sub("", self.code).splitlines()
        return "\n".join(line for line in lines if not line.lstrip().startswith("#"))

    @property
    def triton_launches(self) -> list[str]:
        """Names of the Triton kernels in the order of their launches."""
        return re.findall(r"(\w+)\.run\(", self.body)

    @property
    def extern_launches(self) -> list[str]:
        """Calls of operators that Inductor did not generate code for."""
        pattern = r"(extern_kernels\.\w+|(?:torch\.ops|aten)\.\w+\.\w+(?:\.\w+)?)\("
        return re.findall(pattern, self.body)

    @property
    def launches(self) -> list[str]:
        return self.triton_launches + self.extern_launches


@contextlib.contextmanager
def retargeted(observe: Observer | None = None, execute: bool = True) -> Iterator[list[Wrapper]]:
    """Compiles for the fake device inside the block, and executes on CPU tensors from then on.

    Args:
        observe: called after each launch, while its tensors hold what the kernel read and wrote.
        execute: False to generate only: the call that compiled raises ``NotExecuted``. For graphs with
            operators that have no CPU kernel, as CUDA's attention.
    """
    from torch._inductor import compile_fx as module
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.graph import GraphLowering

    fake_cuda.installed()
    wrappers: list[Wrapper] = []
    kernels: list[Kernel] = []
    load_module = GraphLowering._compile_to_module_lines

    def triton(self: Any, kernel_name: str, source_code: str, device_str: str = "cuda") -> Kernel:
        kernels.append(Kernel(kernel_name, source_code, observe))
        return kernels[-1]

    def load_twin(self: GraphLowering, wrapper_code: Any) -> Any:
        kernels.clear()
        original = wrapper_code.value
        wrapper_code.value = _on_cpu(original)
        loaded = load_module(self, wrapper_code)
        wrapper_code.value = original
        wrappers.append(Wrapper(original, list(kernels)))
        if not execute:
            loaded.call = _refuse
        return loaded

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (AsyncCompile, "triton", triton),
            (GraphLowering, "_compile_to_module_lines", load_twin),
            (module, "compile_fx", _retargeting(module.compile_fx)),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield wrappers


def _refuse(args: Sequence[Any]) -> Any:
    raise NotExecuted("this wrapper was generated with execute=False")


def _on_cpu(code: str) -> str:
    """A wrapper's source with every allocation on the CPU; the kernels' sources are left alone."""
    kernels = _KERNEL_SOURCE.findall(code)
    rest = _KERNEL_SOURCE.split(code)
    for old, new in _TO_CPU:
        rest = [part.replace(old, new) for part in rest]
    pieces = [piece for pair in zip(rest, [*kernels, ""], strict=True) for piece in pair]
    return "".join(pieces)


def _retargeting(compile_fx: Callable[..., Any]) -> Callable[..., Any]:
    inside = False

    def call(gm: fx.GraphModule, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:  # compile_fx calls itself under its config patches
            return compile_fx(gm, inputs, *args, **kwargs)
        inside = True
        try:
            moved = _graph_on_cuda(gm)
            return compile_fx(moved, _inputs_on_cuda(inputs), *args, **kwargs)
        finally:
            inside = False

    return call


def _graph_on_cuda(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph that says cuda:0 wherever it says cpu."""
    from torch.utils._device import _device_constructors

    device = torch.device("cuda:0")

    def fix(argument: Any) -> Any:
        is_cpu = argument == "cpu" if isinstance(argument, str) else False
        is_cpu |= isinstance(argument, torch.device) and argument.type == "cpu"
        return device if is_cpu else argument

    gm = copy.deepcopy(gm)
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op not in ("call_function", "call_method"):
                continue
            node.args, node.kwargs = tree_map(fix, node.args), tree_map(fix, node.kwargs)
            if node.target in _device_constructors() and node.kwargs.get("device") is None:
                node.kwargs = {**node.kwargs, "device": device}
            _fill(node)
        module.recompile()
    return gm


def _fill(node: fx.Node) -> None:
    """A CUDA wheel copies a number to the device where the graph is traced, and asks for a driver."""
    is_number = node.target is torch.tensor and isinstance(node.args[0], int | float)
    if is_number and hasattr(torch._C, "_cuda_setDevice"):
        node.target, node.args = torch.full, ((), *node.args)


def _inputs_on_cuda(inputs: Sequence[Any]) -> list[Any]:
    from torch._dynamo.utils import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode = detect_fake_mode(inputs) or FakeTensorMode(static_shapes=True)

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = value if isinstance(value, FakeTensor) else mode.from_tensor(value)
        meta = torch.empty_strided(known.size(), known.stride(), dtype=known.dtype, device="meta")
        return FakeTensor(mode, meta, torch.device("cuda:0")).requires_grad_(known.requires_grad)

    return [fake(value) for value in inputs]
