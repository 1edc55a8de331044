"""The environments of the engines, and a model in the form that each reads.

Each engine has an environment of its own, since they ask for other versions of the same packages. What
is there already stays.
"""

import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gguf_file import write_gguf

CAPACITY = 1024 + 64 + 2  # tokens of a KV cache
CONVERTERS = ("torch==2.13.0", "transformers")


@dataclass(frozen=True)
class Engine:
    """Attributes:
    worker: its file here.
    packages: of its environment; the first one's version is shown. None: this environment.
    convert: writes ``model`` into a form of its own, as ``(python, model, target)``.
    form: the name of that file or folder.
    has_logits: whether it gives more than tokens.
    """

    worker: str
    packages: tuple[str, ...]
    convert: Callable[[Path, Path, Path], None]
    form: str
    has_logits: bool = True


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _gguf(bits: str) -> Callable[[Path, Path, Path], None]:
    return lambda python, model, target: write_gguf(model, target, bits)


def _onnx(python: Path, model: Path, target: Path) -> None:
    builder = "onnxruntime_genai.models.builder"
    _run(python, "-m", builder, "-i", model, "-o", target, "-p", "int8", "-e", "cpu")


def _openvino(python: Path, model: Path, target: Path) -> None:
    optimum = python.with_name("optimum-cli")
    task = "text-generation-with-past"
    _run(optimum, "export", "openvino", "-m", model, "--task", task, "--weight-format", "int8", target)


def _ctranslate2(python: Path, model: Path, target: Path) -> None:
    converter = "ctranslate2.converters.transformers"
    _run(python, "-m", converter, "--model", model, "--output_dir", target, "--quantization", "int8")


def _ahead(scheme: str) -> Callable[[Path, Path, Path], None]:
    def convert(python: Path, model: Path, target: Path) -> None:
        int8fx = (python, "-m", "int8fx")
        options = ["--scheme", scheme]
        if scheme == "int8-rotated":
            calibration = target.with_suffix(".json")
            _run(*int8fx, "calibrate", model, "--tokens", "64", "--out", calibration)
            options += ["--calibration", calibration]
        where = ("--dtype", "bfloat16", "--context", CAPACITY, "--out", target)
        _run(*int8fx, "compile", model, *where, *options)

    return convert


LLAMA_CPP = ("llama-cpp-python", "numpy")
ENGINES = {
    "llama.cpp Q8_0": Engine("llama_cpp_worker.py", LLAMA_CPP, _gguf("Q8_0"), "q8_0.gguf"),
    "llama.cpp Q4_0": Engine("llama_cpp_worker.py", LLAMA_CPP, _gguf("Q4_0"), "q4_0.gguf"),
    "ONNX Runtime int8": Engine(
        "onnxruntime_worker.py",
        ("onnxruntime-genai", "onnx", "onnx-ir", *CONVERTERS),
        _onnx,
        "onnx",
    ),
    "OpenVINO int8": Engine(
        "openvino_worker.py",
        ("openvino-genai", "optimum-intel", "nncf", *CONVERTERS),
        _openvino,
        "openvino",
    ),
    "CTranslate2 int8": Engine(
        "ctranslate2_worker.py", ("ctranslate2", *CONVERTERS), _ctranslate2, "ctranslate2"
    ),
    **{
        f"int8fx ahead: {scheme}": Engine(
            "ahead_worker.py", (), _ahead(scheme), f"ahead-{scheme}", has_logits=False
        )
        for scheme in ("llm.int8", "int8-rotated")
    },
}


def environment(engine: Engine, root: Path) -> Path:
    """Its Python, made if it is not there. The environment is moved to its place when it is whole."""
    if not engine.packages:
        return Path(sys.executable)
    folder = root / engine.packages[0]
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True)
        _run(python, "-m", "pip", "install", "-q", *engine.packages)
        done.touch()
    return python


def version(python: Path, package: str = "int8fx") -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def readable(model: Path, forms: Path) -> Path:
    """The model as transformers 4 reads it, too, which some converters ask for.

    It knows no ``rope_parameters``, and would take another base of the rotation in silence.
    """
    copy = forms / "transformers"
    if not copy.exists():
        unfinished = forms / "transformers.part"
        shutil.copytree(model, unfinished, dirs_exist_ok=True)
        config = json.loads((model / "config.json").read_text())
        config.setdefault("rope_theta", config.get("rope_parameters", {}).get("rope_theta", 10000.0))
        (unfinished / "config.json").write_text(json.dumps(config, indent=1))
        unfinished.rename(copy)
    return copy


def converted(engine: Engine, python: Path, model: Path, forms: Path) -> Path:
    """The model as the engine reads it, made if it is not there."""
    target = forms / engine.form
    if not target.exists():
        unfinished = forms / f"{engine.form}.part"
        engine.convert(python, readable(model, forms), unfinished)
        unfinished.rename(target)
    return target


if __name__ == "__main__":
    for engine in ENGINES.values():
        print(environment(engine, Path(sys.argv[1])))
