"""Loading a causal language model and its tokenizer, with one line for everything that can fail.

transformers is imported inside the functions: it takes seconds, and ``int8fx --help`` needs none of
it.
"""

import contextlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

from rich.console import Console

from int8fx.bench.progress import step
from int8fx.errors import UserError

log = logging.getLogger(__name__)

ALLOWED = "give a directory, a .gguf file, or a hub name such as owner/name"
CONNECT_SECONDS = 10.0
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")

# transformers reads a GGUF file with both of these.
GGUF_PACKAGES = ("gguf", "accelerate")


def load(name: str, console: Console, **more: Any) -> tuple[Any, Any]:
    """A model in the dtype of its checkpoint, in eval mode, and its tokenizer.

    Args:
        name: a directory, a ``.gguf`` file, or a name on the Hugging Face hub.
        more: arguments of ``from_pretrained``, which a ``.gguf`` file does not take.

    Raises:
        UserError: names what was given and what is allowed.
    """
    check_name(name)
    path = _path(name)
    if path.is_dir():
        read, shown = partial(load_directory, path, **more), _bar(name, console)
    elif path.suffix == ".gguf":
        read, shown = partial(load_gguf, path), _bar(name, console)
    else:
        # The hub's client has bars of its own, one for each file.
        read, shown = partial(load_directory, name, **more), quiet_hub()
    with shown:
        try:
            return read()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"model {name}: {_reason(error)}") from error


def check_name(name: str | None) -> None:
    """What can be said of a name at once, before anything slow is imported; None is the demo's model.

    Raises:
        UserError: names what was given and what is allowed.
    """
    if name is None:
        return
    path = _path(name)
    if path.is_file() and path.suffix == ".gguf":
        require_gguf()
    elif not path.is_dir() and (path.suffix == ".gguf" or not HUB_NAME.fullmatch(name)):
        raise UserError(f"model {name}: no such file or directory; {ALLOWED}")


def _path(name: str) -> Path:
    """With ``~`` for the home folder; ``Path.expanduser`` would raise where there is none."""
    return Path(os.path.expanduser(name))


@contextlib.contextmanager
def _bar(name: str, console: Console) -> Iterator[None]:
    with step(console, f"Loading {name}"), quiet_transformers():
        yield


def load_directory(name: str | Path, **more: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers skips a quantiser that it was not told of, and takes int8 values for the weights.
    import int8fx.integrations.transformers  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **more)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def load_gguf(path: Path) -> tuple[Any, Any]:
    """A GGUF file, de-quantised to fp32."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Where a kernel for GGUF blocks is installed, newer releases would keep the blocks packed.
    config = getattr(transformers, "GgufConfig", None)
    unpack = {} if config is None else {"quantization_config": config(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **unpack
    )
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def require_gguf() -> None:
    """Raises:
    UserError: a package that reads GGUF files is missing.
    """
    missing = [name for name in GGUF_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"reading a GGUF file needs {' and '.join(missing)}: "
            'install with  python -m pip install "int8fx[demo]"'
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own bars off the screen while ours is on it."""
    from tqdm.auto import tqdm
    from transformers.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    # The conversion of GGUF files takes tqdm itself, which asks nobody whether to show.
    initialise = tqdm.__init__
    tqdm.__init__ = partialmethod(initialise, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = initialise
        if shown:
            enable_progress_bar()


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Says at once that the network is missing, where the hub's client would try five times for each
    of a model's files, half a minute each, and print two lines every time."""
    from huggingface_hub import constants

    logger, offline = logging.getLogger("huggingface_hub"), constants.HF_HUB_OFFLINE
    level = logger.level
    logger.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = offline or not hub_answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logger.setLevel(level)


def hub_answers() -> bool:
    """Whether the hub can be reached, asked once, by way of the user's proxies."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except Exception as error:  # the client's own: refused, no name, timed out, a certificate
        log.debug("%s: %s", constants.ENDPOINT, error)
        return False
    return True


def _reason(error: Exception) -> str:
    """One line of an error of transformers, which can run to a paragraph."""
    text = " ".join(str(error).split())
    if re.search(r"couldn't connect|offline|internet connection|Max retries", text, re.IGNORECASE):
        return "not in the hub's local cache, and no network to fetch it"
    if "not a valid model identifier" in text:
        return f"neither a directory nor a model on the hub; {ALLOWED}"
    if "for this kind of AutoModel" in text:
        return "not a causal language model that transformers knows"
    return text if len(text) <= 200 else f"{text[:200]}..."
