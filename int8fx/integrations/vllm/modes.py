"""What vLLM's configuration says of the compilation of a model."""

from typing import Any

from vllm.config import CompilationMode, get_current_vllm_config_or_none

METHOD = "int8fx"
BACKEND = "llmint8"
ONE_TRACE = (CompilationMode.STOCK_TORCH_COMPILE, CompilationMode.DYNAMO_TRACE_ONCE)


def compiles_with_ours() -> bool:
    """Whether the model that vLLM is about to build is compiled by the backend ``llmint8``."""
    config = get_current_vllm_config_or_none()
    return config is not None and is_ours(config.compilation_config)


def is_ours(compilation: Any) -> bool:
    """
    Args:
        compilation: vLLM's ``CompilationConfig``.
    """
    return compilation.mode in ONE_TRACE and compilation.backend == BACKEND
