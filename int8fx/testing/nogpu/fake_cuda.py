"""A CUDA device that is not there: enough of one for Dynamo, AOTAutograd and Inductor to target it.

    install("H100")          # before torch._inductor is used, in a process of its own

Every query that torch makes about the device is answered from a data sheet (``GPUS``), Triton gets a
driver that knows its target and launches nothing, and fake tensors may live on ``cuda:0``. Works with
torch's CPU wheel, and with a CUDA wheel on a machine without a driver.

The patches are global and are not taken back: keep the process for this purpose.
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Gpu:
    """What Inductor and Triton ask about a device. Memory in bytes."""

    name: str
    arch: int
    multiprocessors: int
    shared_memory: int
    l2: int
    memory: int
    threads: int

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(self.arch, 10)


_GIB = 1 << 30
_MIB = 1 << 20
GPUS: dict[str, Gpu] = {
    "A100": Gpu("NVIDIA A100-SXM4-80GB", 80, 108, 166912, 40 * _MIB, 80 * _GIB, 2048),
    "A10G": Gpu("NVIDIA A10G", 86, 80, 101376, 6 * _MIB, 24 * _GIB, 1536),
    "L40S": Gpu("NVIDIA L40S", 89, 142, 101376, 96 * _MIB, 48 * _GIB, 1536),
    "H100": Gpu("NVIDIA H100 80GB HBM3", 90, 132, 232448, 50 * _MIB, 80 * _GIB, 2048),
    "B200": Gpu("NVIDIA B200", 100, 148, 232448, 126 * _MIB, 180 * _GIB, 2048),
    "RTX5090": Gpu("NVIDIA GeForce RTX 5090", 120, 170, 101376, 96 * _MIB, 32 * _GIB, 1536),
}

_installed: list[Gpu] = []


def installed() -> Gpu:
    """The device that this process believes in.

    Raises:
        RuntimeError: ``install`` was not called.
    """
    if not _installed:
        raise RuntimeError("fake_cuda.install(...) comes first")
    return _installed[-1]


def is_installed() -> bool:
    return bool(_installed)


def install(name: str = "H100") -> Gpu:
    """Makes this process believe in one GPU.

    Args:
        name: a key of ``GPUS``.

    Raises:
        RuntimeError: the process has a real CUDA device, or believes in another one.
    """
    gpu = GPUS[name]
    if _installed:
        if installed() != gpu:
            raise RuntimeError(f"this process already believes in {installed().name}")
        return gpu
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a CUDA device; nothing needs to be faked")
    _installed.append(gpu)
    _patch_torch_cuda(gpu)
    _patch_device_interface()
    _patch_fake_tensors()
    _patch_inductor()
    set_active_driver()
    return gpu


def set_active_driver() -> None:
    """Gives Triton the driver of the fake device."""
    from triton.runtime import driver

    driver.set_active(_Driver(installed()))


class _Driver:
    """The part of ``triton.backends.driver.DriverBase`` that Inductor and Triton's JIT touch."""

    assemble_tensormap_to_arg = None

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._target = GPUTarget("cuda", gpu.arch, 32)
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda _device: {
                "max_shared_mem": gpu.shared_memory,
                "multiprocessor_count": gpu.multiprocessors,
                "max_num_regs": 65536,
                "warpSize": 32,
            },
            load_binary=lambda name, kernel, shared, device: (None, 0x1234, 0, 0, 1024),
        )
        self.launcher_cls = lambda source, metadata: lambda *args, **kwargs: None

    def get_device_capability(self, _device: int = 0) -> tuple[int, int]:
        return self._gpu.capability

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, _device: int) -> None:
        pass

    def get_current_stream(self, _device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Any:
        return lambda function, **kwargs: 1.0

    def map_python_to_cpp_type(self, type_: Any) -> Any:
        return type_

    @staticmethod
    def is_active() -> bool:
        return True


class _NoGuard:
    """Stands for ``torch.cuda.device`` and its relatives: there is one device, always current."""

    def __init__(self, *args: Any) -> None:
        pass

    def __enter__(self) -> "_NoGuard":
        return self

    def __exit__(self, *args: Any) -> bool:
        return False


def _properties(gpu: Gpu) -> types.SimpleNamespace:
    major, minor = gpu.capability
    return types.SimpleNamespace(
        name=gpu.name,
        major=major,
        minor=minor,
        multi_processor_count=gpu.multiprocessors,
        total_memory=gpu.memory,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=gpu.threads,
        max_threads_per_block=1024,
        warp_size=32,
        L2_cache_size=gpu.l2,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=gpu.shared_memory,
        shared_memory_per_multiprocessor=gpu.shared_memory + 1024,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="",
        clock_rate=1_755_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
        uuid="fake",
    )


def _patch_torch_cuda(gpu: Gpu) -> None:
    properties = _properties(gpu)
    memory = (gpu.memory, gpu.memory)
    answers = {
        "is_available": True,
        "_is_compiled": True,
        "is_initialized": True,
        "_lazy_init": None,
        "init": None,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_device_properties": properties,
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
        "get_arch_list": [f"sm_{gpu.arch}"],
        "is_bf16_supported": True,
        "is_tf32_supported": True,
        "mem_get_info": memory,
        "memory_allocated": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "set_rng_state": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "is_current_stream_capturing": False,
        "empty_cache": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    torch.cuda.get_rng_state = lambda *args: torch.empty(16, dtype=torch.uint8)
    torch.cuda.device = torch.cuda._DeviceGuard = _NoGuard
    torch.cuda.graphs._cuda_isCurrentStreamCapturing = _always(False)
    torch._C._cuda_getDevice = _always(0)
    torch._C._cuda_getCurrentRawStream = _always(0)
    torch.accelerator.is_available = _always(False)
    torch.accelerator.current_accelerator = _always(None)
    torch.accelerator.current_device_index = _always(0)
    if torch.version.cuda is None:
        torch.version.cuda = "13.0"


def _always(answer: Any) -> Any:
    return lambda *args, **kwargs: answer


def _patch_device_interface() -> None:
    from torch._dynamo import device_interface

    interface = device_interface.CudaInterface
    for name in (
        "current_device",
        "set_device",
        "device_count",
        "synchronize",
        "get_device_properties",
        "memory_allocated",
        "is_bf16_supported",
    ):
        setattr(interface, name, staticmethod(getattr(torch.cuda, name)))
    interface.device = _NoGuard
    interface.exchange_device = staticmethod(torch.cuda._exchange_device)
    interface.maybe_exchange_device = staticmethod(torch.cuda._maybe_exchange_device)
    interface.get_raw_stream = staticmethod(torch._C._cuda_getCurrentRawStream)
    device_interface.get_cuda_stream = torch._C._cuda_getCurrentRawStream
    device_interface.caching_worker_device_properties["cuda"] = [torch.cuda.get_device_properties()]
    device_interface.caching_worker_current_devices["cuda"] = 0


def _patch_fake_tensors() -> None:
    from torch._subclasses import fake_tensor

    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)
    fake_tensor.init_gpu_context = _always(None)  # torch 2.11 asks for CUDA itself
    if hasattr(torch._C, "_cuda_setDevice"):
        return
    # A CPU wheel has no device guard for CUDA, so x[:, None] on a fake CUDA tensor raises "PyTorch is
    # not linked with support for cuda devices". c10 exports its registry of guards, an array of
    # pointers: the CPU's guard, which does nothing, goes into CUDA's place.
    import ctypes
    from pathlib import Path

    cpu, cuda = 0, 1
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    symbol = "_ZN3c104impl26device_guard_impl_registryE"
    registry = (ctypes.c_void_p * 2).in_dll(c10, symbol)
    registry[cuda] = registry[cuda] or registry[cpu]


def _patch_inductor() -> None:
    import torch._inductor.config as config
    import torch._inductor.fx_passes.misc_patterns as misc_patterns
    from torch._inductor.runtime import triton_helpers

    # Workers would not have these patches, and a cache would outlive them.
    config.compile_threads = 1
    config.force_disable_caches = True
    config.use_static_triton_launcher = False
    # Generated kernels call it when they are loaded and compiled, and it looks for a real driver.
    triton_helpers.set_driver_to_gpu = set_active_driver
    config.shape_padding = False  # it measures, on the device, whether padding a matmul pays
    # These patterns trace torch.randperm on the device, which has no generator.
    init = misc_patterns._misc_patterns_init
    misc_patterns._misc_patterns_init = lambda *args, **kwargs: init(torch.device("cpu"))
    _fold_constants_on_cpu()


def _fold_constants_on_cpu() -> None:
    """Inductor's constant folders run factory functions for real, on the graph's device."""
    import torch._inductor.constant_folding as folding
    import torch._inductor.fx_passes.joint_graph as joint_graph
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map

    def to_cpu(argument: Any) -> Any:
        is_cuda = isinstance(argument, torch.device) and argument.type == "cuda"
        return torch.device("cpu") if is_cuda else argument

    class OnCpu(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs or {}))

    def on_cpu(method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with OnCpu():
                return method(self, *args, **kwargs)

        return call

    for folder in (folding.ConstantFolder, joint_graph.UniformValueConstantFolder):
        for name in ("_deduce_value", "_add_peephole_patterns"):
            if name in vars(folder):
                setattr(folder, name, on_cpu(vars(folder)[name]))
