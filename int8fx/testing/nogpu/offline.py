"""Compiles Triton kernels for GPUs that are not there.

compiled = compile_kernel(kernel, "sm_90", {"x_ptr": "*fp16", "K": "i32"}, {"BLOCK": 64}, 4, 3)
sass.inspect(compiled).registers
"""

import contextlib
import io
from collections.abc import Collection, Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942")
TARGETS = (*NVIDIA, *AMD)


def target(name: str) -> GPUTarget:
    """``"sm_90"`` or ``"gfx942"`` as Triton's target."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def compile_kernel(
    kernel: Any,
    arch: str,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    unaligned: Collection[str] = (),
) -> Any:
    """What ``kernel[grid](...)`` would compile, for an architecture by name.

    Args:
        kernel: a ``@triton.jit`` function.
        signature: the Triton type of each argument that is no constant.
        constants: the values of ``tl.constexpr`` arguments, and of pointers that are None.
        unaligned: arguments of which it is not known that 16 divides them.
    """
    types = dict(signature) | dict.fromkeys(constants, "constexpr")
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned
        for index, name in enumerate(kernel.arg_names)
        if name in signature and name not in unaligned and signature[name] not in ("fp32", "i1")
    }
    ordered = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=ordered, constexprs=dict(constants), attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    # Triton prints the whole PTX to stdout when ptxas fails.
    with contextlib.redirect_stdout(io.StringIO()):
        return triton.compile(source, target=target(arch), options=options)


def compile_generated(kernel: Any, arch: str, first: bool = False) -> list[Any]:
    """Every configuration of a kernel of a generated wrapper (``inductor.Kernel``).

    Args:
        arch: ``"sm_90"``, or ``"gfx942"``. For AMD it is the code that Inductor wrote for NVIDIA, with
            AMD's ``libdevice``: Inductor on ROCm may choose other blocks for the same lines.
        first: only the first configuration.
    """
    configs = kernel.autotuner.configs[: 1 if first else None]
    compile_one = _for_nvidia if arch in NVIDIA else _for_amd
    with contextlib.redirect_stdout(io.StringIO()):
        return [compile_one(kernel.autotuner, config, target(arch)) for config in configs]


def _for_nvidia(tuner: Any, config: Any, target: GPUTarget) -> Any:
    known = tuner.device_props
    tuner.device_props = known._replace(cc=target.arch, major=target.arch // 10)
    try:
        return tuner._precompile_config(config).kernel
    finally:
        tuner.device_props = known


def _for_amd(tuner: Any, config: Any, target: GPUTarget) -> Any:
    from triton.language.extra.hip import libdevice

    meta = tuner.triton_meta
    constants = dict(meta.get("constants", {})) | config.kwargs
    constants = {name: value for name, value in constants.items() if name in tuner.fn.arg_names}
    signature = {name: meta["signature"].get(name, "constexpr") for name in tuner.fn.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=tuner.fn, signature=signature, constexprs=constants, attrs=meta["configs"][0])
    scope = tuner.fn.fn.__globals__
    of_nvidia = scope.get("libdevice")
    scope["libdevice"] = libdevice
    try:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return triton.compile(source, target=target, options=options)
    finally:
        scope["libdevice"] = of_nvidia
