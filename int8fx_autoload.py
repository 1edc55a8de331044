"""What int8fx adds to transformers, diffusers and accelerate, in every process that imports torch.

torch calls ``autoload`` at the end of ``import torch``, wherever int8fx is installed (entry point group
``torch.backends``; ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` in the environment switches that off), and
``import int8fx`` calls ``register``. From then on, without an import of int8fx:

    transformers  knows the quantisation "int8fx", so from_pretrained reads int8 files; it reads those
                  of GPTQ, AWQ and others, too, where the package of their owner is missing;
    diffusers     the same;
    accelerate    knows the compiler backend "llmint8", so the Trainer takes it by its name.

``import torch`` must neither fail nor become slow because of this. So the module stands outside of the
package, imports nothing but the standard library, and waits until one of these is imported. int8fx
itself is imported by the first model that needs it.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

METHOD = "int8fx"
READER = "int8fx-reader"
# Whose files int8fx reads where nobody else can, or where it was asked to
# (``int8fx/integrations/transformers_readers.py``); and "gguf", which has a quantiser of its own.
READ = (
    "gptq", "awq", "bitsandbytes_4bit", "bitsandbytes_8bit", "compressed-tensors", "eetq", "hqq",
    "quanto", "torchao", "fp8", "mxfp4",
)  # fmt: skip
QUANTO_MAP = "quanto_qmap.json"
BACKEND = "LLMINT8"  # accelerate spells all of them so

# Whether ``import int8fx`` leaves out what needs torch, see ``int8fx_run.py``.
light = False


def autoload() -> None:
    """``register``, for torch: what fails in here is logged, and ``import torch`` goes on."""
    try:
        register()
    except Exception:
        log.warning("int8fx could not register itself", exc_info=True)


def register() -> None:
    """Makes int8fx known to the libraries above, now or as soon as they are imported."""
    # The first import of torch may come from the middle of the first module, which is not whole then;
    # the second imports torch before it, and no model is loaded without it.
    after_import("transformers.quantizers.auto", _add_quantizer)
    after_import("transformers.modeling_utils", _add_quantizer)
    after_import("transformers.modeling_utils", _look_for_quanto)
    after_import("diffusers.quantizers.auto", _add_to_diffusers)
    after_import("diffusers.models.modeling_utils", _add_to_diffusers)
    after_import("accelerate.utils.dataclasses", _add_backend)


def make_whole() -> None:
    """Imports what ``import int8fx`` left out, once torch is there."""
    global light
    light = False
    native: Any = sys.modules.get("int8fx.ahead.native")
    if native is not None:
        native.forget_definitions()
    importlib.reload(sys.modules["int8fx"])


# --- transformers --------------------------------------------------------------------------------


def _add_quantizer() -> None:
    auto: Any = sys.modules.get("transformers.quantizers.auto")
    if not hasattr(auto, "register_quantizer") or METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Int8FxConfig(QuantizationConfigMixin):
        """Stands for ``int8fx.integrations.transformers.Int8FxConfig`` until a model needs that."""

        @classmethod
        def from_dict(cls, config_dict: Any, *args: Any, **kwargs: Any) -> Any:
            from int8fx.integrations.transformers import Int8FxConfig

            return Int8FxConfig.from_dict(config_dict, *args, **kwargs)

    class Int8FxQuantizer(auto.HfQuantizer):
        """Stands for ``int8fx.integrations.transformers.Int8FxQuantizer``."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from int8fx.integrations.transformers import Int8FxQuantizer

            return Int8FxQuantizer(*args, **kwargs)

    auto.register_quantization_config(METHOD)(Int8FxConfig)
    auto.register_quantizer(METHOD)(Int8FxQuantizer)
    _add_readers(auto)


def _add_readers(auto: Any) -> None:
    """Who reads a file is decided when there is one."""

    class ReaderQuantizer(auto.HfQuantizer):
        """Stands for ``int8fx.integrations.transformers_readers.ReaderQuantizer``."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from int8fx.integrations.transformers_readers import ReaderQuantizer

            return ReaderQuantizer(*args, **kwargs)

    auto.register_quantizer(READER)(ReaderQuantizer)
    configs = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    for method in READ:
        if method in configs:
            configs[method] = _reading(method, configs[method])

    quantizers = auto.AUTO_QUANTIZER_MAPPING
    if "gguf" in quantizers:  # releases up to 5.20 read these files without one
        quantizers["gguf"] = _reading_gguf(quantizers["gguf"])


def _reading_gguf(theirs: Any) -> Any:
    """transformers' quantiser of GGUF files, which int8fx may read."""

    class Reading(theirs):
        """One of theirs, or ``int8fx.integrations.transformers_gguf.GgufQuantizer``."""

        def __new__(cls, config: Any, **options: Any) -> Any:
            from int8fx.integrations.transformers_gguf import quantizer_of

            return quantizer_of(theirs, config, **options)

    Reading.__name__, Reading.__qualname__ = theirs.__name__, theirs.__qualname__
    return Reading


def _look_for_quanto() -> None:
    """quanto's folders do not say in ``config.json`` what they are, and transformers asks nobody."""
    modeling: Any = sys.modules["transformers.modeling_utils"]
    theirs = getattr(modeling, "get_hf_quantizer", None)
    if theirs is None:
        return

    @functools.wraps(theirs)
    def get_hf_quantizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        folder = getattr(config, "_name_or_path", "")
        file = os.path.join(folder, QUANTO_MAP)
        says_nothing = getattr(config, "quantization_config", None) is None
        if folder and says_nothing and os.path.isfile(file):
            from int8fx.integrations.transformers_readers import tell_of_quanto

            tell_of_quanto(config, file)
        return theirs(config, *args, **kwargs)

    modeling.get_hf_quantizer = get_hf_quantizer


def _reading(method: str, theirs: Any) -> Any:
    """transformers' configuration of a method, whose files int8fx may read."""

    class Reading(theirs):
        """What makes a configuration of a file's; all else is as it was."""

        @classmethod
        def from_dict(cls, config_dict: Any, *args: Any, **kwargs: Any) -> Any:
            from int8fx.integrations.transformers_readers import config_of

            return config_of(method, theirs, config_dict, *args, **kwargs)

    Reading.__name__, Reading.__qualname__ = theirs.__name__, theirs.__qualname__
    return Reading


# --- diffusers -----------------------------------------------------------------------------------


def _add_to_diffusers() -> None:
    auto: Any = sys.modules.get("diffusers.quantizers.auto")
    if not hasattr(auto, "DiffusersAutoQuantizer"):
        return

    class Int8FxConfig:
        """Stands for ``int8fx.integrations.diffusers.Int8FxConfig``."""

        @classmethod
        def from_dict(cls, config_dict: Any, *args: Any, **kwargs: Any) -> Any:
            from int8fx.integrations.diffusers import Int8FxConfig

            return Int8FxConfig.from_dict(config_dict, *args, **kwargs)

    def quantizer(*args: Any, **kwargs: Any) -> Any:
        from int8fx.integrations.diffusers import Int8FxQuantizer

        return Int8FxQuantizer(*args, **kwargs)

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, Int8FxConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, quantizer)


# --- accelerate ----------------------------------------------------------------------------------


def _add_backend() -> None:
    """Lets ``DynamoBackend("LLMINT8")`` be one of accelerate's backends, and not an error."""
    backends: Any = sys.modules["accelerate.utils.dataclasses"].DynamoBackend
    if BACKEND in backends:
        return
    backend = str.__new__(backends, BACKEND)
    backend._name_ = backend._value_ = BACKEND
    others = backends._missing_

    def missing(cls: Any, value: object) -> Any:
        return backend if value == BACKEND else others(value)

    backends._missing_ = classmethod(missing)


# --- waiting for an import -----------------------------------------------------------------------


def after_import(name: str, callback: Callable[[], None]) -> None:
    """Calls a function when a module has been imported; now, when it has been."""
    if name in sys.modules:
        _call(callback)
        return
    _finder.waiting.setdefault(name, []).append(callback)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _call(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:  # the import of somebody else's module must not fail
        log.warning("int8fx could not register itself", exc_info=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are waited for where the other finders do."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[], None]]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            self._call_after(name, spec.loader)
        return spec

    def _call_after(self, name: str, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # it is as it was
            execute(module)
            for callback in self.waiting.pop(name, ()):
                _call(callback)

        loader.exec_module = exec_module


_finder = _Finder()
