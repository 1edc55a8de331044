"""Options in a file, as ``int8fx suggest --out`` writes them: one JSON object, an entry an option.

{"rules": [["*.mlp.*", "w8a16", {}]], "skip": ["lm_head"]}
"""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any


def load_options(path: str | PathLike[str]) -> dict[str, Any]:
    """The options in a file, for ``torch.compile(options=...)`` and ``quantize_(model, **options)``.

    ``torch.compile(options=path)`` and every command (``--options``) read the file themselves. A
    ``calibration`` is a file's name, as seen from the folder of the options.

    Raises:
        ValueError: the file is no JSON object; it is named.
        FileNotFoundError: it is not there.

    Examples:
        >>> import int8fx, json, pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "options.json"
        >>> _ = file.write_text(json.dumps({"scheme": "w8a16", "skip": ["lm_head"]}))
        >>> int8fx.load_options(file)
        {'scheme': 'w8a16', 'skip': ['lm_head']}
    """
    file = Path(path)
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # what is no text is one as well
        raise ValueError(f"{path}: no options: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(
            f"{path}: no options: a {type(options).__name__}; "
            'allowed: an object, as {"threshold": 3.0}'
        )
    if isinstance(options.get("calibration"), str):
        options["calibration"] = str(file.parent / options["calibration"])
    return options


def save_options(options: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Writes what ``load_options`` reads."""
    Path(path).write_text(json.dumps(dict(options), indent=2) + "\n", encoding="utf-8")
