"""Warns of ``torch.export`` of a compiled model, which exports the float model.

``torch.compile`` leaves the module as it is, and export traces the module. Who compiled it with
``llmint8`` may take the program for the int8 one. ``int8fx/backend.py`` installs this, for processes
that use the backend.
"""

import warnings
from collections.abc import Callable
from typing import Any

from int8fx import torch_private


def install(backend: Callable[..., Any]) -> None:
    """Makes an export warn whose module is compiled for a backend."""

    def exported(module: Any) -> None:
        if torch_private.is_compiled_for(module, backend):
            warnings.warn(
                "torch.export exports the float model, and not what torch.compile made of it with "
                "llmint8; int8fx.quantize_(model) before the export puts the int8 linears into the "
                "program",
                UserWarning,
                stacklevel=4,
            )

    torch_private.before_export(exported)
