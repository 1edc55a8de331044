"""What every benchmark says of the machine, and results as plain values for JSON."""

import dataclasses
import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> str:
    """The processor, what it can do, the threads, and torch's release."""
    capability = torch.backends.cpu.get_cpu_capability()
    amx = torch.cpu.get_capabilities().get("amx_int8", False)
    return (
        f"{processor()}, {torch.get_num_threads()} threads, {capability}{' with AMX' if amx else ''}, "
        f"torch {torch.__version__}"
    )


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def plain(value: Any) -> Any:
    """Dataclasses as dicts, however deep."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value
