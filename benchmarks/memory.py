"""Memory of loading a model: peak over the process before it, and what stays, for each way to int8.

    python benchmarks/memory.py                   # a Llama of 1.1 billion random weights
    python benchmarks/memory.py --layers 2 --json

Each contender loads the same bf16 checkpoint in a process of its own. The peak is the kernel's high
water mark of resident memory (``VmHWM``), reset just before the load; mapped files that are still in
memory count, and every float weight is read once after the load, so that none is only mapped.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 2**20
CONTENDERS = ("transformers bf16", "bitsandbytes int8", "int8fx")


@dataclass
class Measured:
    """In bytes.

    Attributes:
        footprint: ``model.get_memory_footprint()``.
        linears: of the weights of the decoder's linears.
        peak, resident: over the process before the load, at most and after it.
    """

    contender: str
    footprint: int
    linears: int
    peak: int
    resident: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--shard", default="500MB", help="of the bf16 checkpoint")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--load", nargs=2, metavar=("CONTENDER", "PATH"), help=argparse.SUPPRESS)
    parser.add_argument("--build", metavar="PATH", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.build, arguments.layers, arguments.shard)
        return
    if arguments.load:
        print(json.dumps(asdict(measure(*arguments.load))))
        return
    with tempfile.TemporaryDirectory() as directory:
        # In a process of its own, too, which gives its memory back.
        run(
            __file__,
            "--layers",
            str(arguments.layers),
            "--shard",
            arguments.shard,
            "--build",
            directory,
        )
        results = [load(contender, directory) for contender in CONTENDERS]
    print(json.dumps([asdict(result) for result in results])) if arguments.json else show(results)


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def load(contender: str, path: str) -> Measured:
    return Measured(**json.loads(run(__file__, "--load", contender, path).splitlines()[-1]))


def build(path: str, layers: int, shard: str) -> None:
    """Writes TinyLlama's architecture with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size=shard)


def measure(contender: str, path: str) -> Measured:
    import torch
    from transformers import AutoModelForCausalLM

    options = _options(contender)
    warm_up(options)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high water mark starts here
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter and parameter.is_floating_point():
            parameter.data.sum()
    peak, resident = _memory("VmHWM") - before, _memory("VmRSS") - before
    linears = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    in_linears = sum(round(weight.numel() * weight.element_size()) for weight in linears)
    footprint = round(model.get_memory_footprint())
    return Measured(contender, footprint, in_linears, peak, resident)


def _options(contender: str) -> dict:
    if contender == "int8fx":
        from int8fx.integrations.transformers import Int8FxConfig

        return {"quantization_config": Int8FxConfig()}
    if contender == "bitsandbytes int8":
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    return {}


def warm_up(options: dict) -> None:
    """Loads a tiny model the same way: what libraries and kernels take is not the weights'."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(config).save_pretrained(directory)
        AutoModelForCausalLM.from_pretrained(directory, **options)


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def show(results: list[Measured]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    figures = ("footprint", "linears", "of bf16", "peak", "over footprint", "resident")
    table = Table(Column("MiB", no_wrap=True), *figures)
    of_bf16 = results[0].linears
    for result in results:
        table.add_row(
            result.contender.split()[0],  # at 80 columns there is no room for its dtype
            f"{result.footprint / MIB:,.0f}",
            f"{result.linears / MIB:,.0f}",
            f"{result.linears / of_bf16:.3f}x",
            f"{result.peak / MIB:,.0f}",
            f"{result.peak / result.footprint:.2f}x",
            f"{result.resident / MIB:,.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
