"""How vLLM compiles a model with int8 linears, and what its log says of it.

vLLM decides on a compilation mode when it builds its configuration. Where it would decide by itself,
on a CPU, this makes it trace once with the backend ``llmint8``: mode 2, as
``--compilation-config '{"mode": 2, "backend": "llmint8"}'`` says it. Whatever the user asks for stays.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from vllm.config import CompilationMode
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from int8fx.integrations.vllm import scaled_mm
from int8fx.integrations.vllm.modes import BACKEND, METHOD, is_ours
from int8fx.passes.linears.decision import in_schemes

log = logging.getLogger("vllm.int8fx")  # below vLLM's own, so that it goes where its log goes

COMPRESSED_TENSORS = "compressed-tensors"


def install() -> None:
    """Puts the two steps of this module into vLLM, once for a process."""
    platform = type(current_platform)
    if not hasattr(platform.apply_config_platform_defaults, "__wrapped__"):
        _around(platform, "apply_config_platform_defaults", before=choose_mode)
        _around(platform, "check_and_update_config", after=describe_mode)
        BaseModelLoader.load_model = _counting(BaseModelLoader.load_model)


def choose_mode(vllm_config: Any) -> None:
    """Mode 2 with ``llmint8``, where the model has int8 linears and the user said nothing else."""
    compilation = vllm_config.compilation_config
    left_open = compilation.mode is None and compilation.backend in ("", "inductor")
    on_cpu = vllm_config.device_config.device_type == "cpu"
    if left_open and on_cpu and vllm_config.optimization_level > 0 and _in_int8(vllm_config):
        compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE
        compilation.backend = BACKEND
        if not {"all", "none"}.intersection(compilation.custom_ops):
            # As vLLM does for Inductor, which fuses what would be kernels of vLLM.
            compilation.custom_ops.append("none")


def describe_mode(vllm_config: Any) -> None:
    """One line of the log."""
    compilation = vllm_config.compilation_config
    if _in_int8(vllm_config):
        log.info("int8fx: %s", _description(compilation))
    elif is_ours(compilation) and vllm_config.model_config is not None:
        log.warning(
            "int8fx: the backend %r finds no linear in this model, since vLLM hides them behind "
            "operators of its own; give --quantization int8fx as well",
            BACKEND,
        )


def _description(compilation: Any) -> str:
    if compilation.mode in (None, CompilationMode.NONE):
        return "eager, int8 linears by operators"
    compiled = f"compiled by {compilation.backend or 'inductor'!r} in mode {compilation.mode.value}"
    if not is_ours(compilation):
        return f"{compiled}, int8 linears by operators"
    return f"{compiled}, int8 linears fused"


def _in_int8(vllm_config: Any) -> bool:
    quantization = vllm_config.quant_config
    if quantization is None:
        return False
    name = quantization.get_name()
    return name == METHOD or (name == COMPRESSED_TENSORS and scaled_mm.serves(quantization))


def _around(
    owner: Any,
    name: str,
    before: Callable[[Any], None] = lambda vllm_config: None,
    after: Callable[[Any], None] = lambda vllm_config: None,
) -> None:
    """Calls functions before and after a class method of vLLM's platform that takes its
    configuration."""
    theirs = getattr(owner, name).__func__

    @functools.wraps(theirs)
    def method(cls: Any, vllm_config: Any) -> None:
        before(vllm_config)
        theirs(cls, vllm_config)
        after(vllm_config)

    setattr(owner, name, classmethod(method))


def _counting(load_model: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_model)
    def load(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = load_model(self, vllm_config, *args, **kwargs)
        if vllm_config.quant_config is not None and vllm_config.quant_config.get_name() == METHOD:
            report(vllm_config.quant_config)
        return model

    return load


def report(quantization: Any) -> None:
    """How many layers are in int8; a warning where none is."""
    decisions = quantization.decisions
    accepted = [decision.scheme for decision in decisions if decision.accepted]
    for decision in decisions:
        log.debug("%s", decision)
    if accepted:
        log.info("int8fx: %d of %d layers %s", len(accepted), len(decisions), in_schemes(accepted))
        return
    reasons = "".join(f"\n  {decision}" for decision in decisions)
    log.warning("int8fx: no layer of this model is quantised%s", reasons)
