"""These tests patch torch for good (``nogpu/fake_cuda.py``), so each tier has a process of its own.

``tests/test_gpuless.py`` starts those; a plain ``pytest`` run collects nothing here.
"""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    alone = bool(asked) and all(HERE in path.parents for path in asked)
    return None if alone else True
