"""Models that ``int8fx compile`` made, without ``import torch``: the command ``int8fx``, and ``load``.

    import int8fx_run

    model = int8fx_run.load("smollm2")
    print(model.generate("The capital of France is"))

``int8fx.load`` is the same in a process that imports torch anyway: ``import int8fx`` does. The module
stands outside of the package, so that it can say so before.
"""

import sys
from pathlib import Path
from typing import Any

import int8fx_autoload

if "torch" not in sys.modules and "int8fx" not in sys.modules:
    int8fx_autoload.light = True


def load(folder: str | Path, *, threads: int | None = None) -> Any:
    """``int8fx.load``: an ``int8fx.ahead.model.Model``."""
    from int8fx.ahead.model import load

    return load(folder, threads=threads)


def main() -> int:
    """The command ``int8fx``."""
    from int8fx.cli.app import main

    return main()
