"""What the GPU kernels compile to, and how many launches a layer takes, as Markdown.

    python benchmarks/gpu_kernels.py            # writes benchmarks/gpu_kernels.md

Compiles every kernel in every configuration for eight GPU architectures, on any machine; no GPU is
used. ``tests/gpuless`` asserts the limits (no spills, int8 matrix instructions, blocks per
multiprocessor).
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_suffix(".md")

HEADER = """\
# What the GPU kernels compile to

Written by `python benchmarks/gpu_kernels.py` with triton {version}, fp16 activations. No GPU was used:
these are properties of the compiled code. *Blocks* run at once on one multiprocessor (compute unit on
AMD), by registers, shared memory and threads; in brackets how many the table of configurations intends.

| GPU | kernel | warps | stages | registers | spilled bytes | shared KiB | blocks | matrix instr. |
|---|---|---|---|---|---|---|---|---|
"""


def rows(architectures: list[str]) -> Iterator[str]:
    """One row of the table for each compile."""
    from int8fx.testing.gpuless import specimens

    for arch in architectures:
        for specimen in specimens.specimens(arch):
            seen = specimen.inspection
            mma = ", ".join(f"{count} {name}" for name, count in seen.mma.items()) or "none"
            yield (
                f"| {arch} | {specimen.label} | {specimen.num_warps} | {specimen.num_stages} "
                f"| {seen.registers} | {seen.spill_bytes} | {seen.shared_bytes / 1024:.0f} "
                f"| {seen.blocks_per_multiprocessor} ({specimen.blocks}) | {mma} |"
            )


def launch_table() -> str:
    """Launches of one Llama decoder layer; in a process of its own, which pretends to have a GPU."""
    command = [sys.executable, "-m", "int8fx.testing.gpuless.layer_launches"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def main() -> None:
    import triton

    from int8fx.testing.nogpu import offline

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=list(offline.TARGETS), metavar="ARCH")
    arguments = parser.parse_args()
    lines = []
    for row in rows(arguments.arch):
        print(row, flush=True)
        lines.append(row)
    text = HEADER.format(version=triton.__version__) + "\n".join(lines) + "\n"
    TABLE.write_text(text + "\n" + launch_table())
    print(f"written to {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
