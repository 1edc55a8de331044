"""AWQ's files of 4 bits, in its three layouts.

    gemm        qweight [K, N / 8] int32      nibble i of a word is column 0 2 4 6 1 3 5 7 of eight
                qzeros  [G, N / 8] int32      the same
                scales  [G, N]
    gemv        qweight [N, K / 8] int32      nibbles in order
                qzeros  [N, W] int32          groups in order, W words of them, with room for more
                scales  [N, 8 · W]
    gemv_fast   qweight [N / 4, K] int16      four rows interleaved, see ``_fast_codes``
                qzeros  [8 · W, N]            -scale · z, in the unit of the weight
                scales  [8 · W, N]

    ŵ = (q - z) · scale

Beside a linear before an activation AWQ may have moved a part of the next linear's scale into the
activation: ``act.scales``, y = act(x) / scales (``activations.py``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from int8fx.weights.readers.module import StoredModule
from int8fx.weights.readers.neutral import Grouped
from int8fx.weights.readers.settings import Config
from int8fx.weights.readers.unpacking import unpack

BITS = 4
LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm-awq")
# Where in a word of eight each column is.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_ROWS = 4  # that gemv_fast interleaves
_STEP = 64  # of K
# gemv pads its groups by a factor that depends on their size.
_PADDING = {64: 2, 32: 4, 16: 8}
_OF_THE_MAKER = frozenset(
    "quant_method method zero_point sym desc_act modules_to_not_convert do_fuse fuse_max_seq_len "
    "modules_to_fuse backend exllama_config meta lm_head model_seqlen provider version_info pack_dtype "
    "dynamic damp_percent true_sequential".split()
)
_READ = frozenset(
    {"bits", "w_bit", "group_size", "q_group_size", "version", "format", "checkpoint_format"}
)


@dataclass(frozen=True)
class Settings:
    """Attributes:
    layout: of ``LAYOUTS``.
    group: columns that share a scale; 0: all.
    """

    layout: str
    group: int


def settings(config: Config) -> Settings:
    """Raises:
    CheckpointError: an option is unknown, or has a value that is not read.
    """
    config.only(_OF_THE_MAKER | _READ)
    for name in ("bits", "w_bit"):
        if name in config.values:
            config.one_of(name, (BITS,))
    if not any(name in config.values for name in ("bits", "w_bit")):
        raise config.error("bits is missing")
    if config.get("dynamic"):
        raise config.error(f"dynamic = {config.get('dynamic')!r} is not read")
    named = {
        str(config.get(n)).lower() for n in ("version", "format", "checkpoint_format") if config.get(n)
    }
    layout = next(iter(named), "gemm")
    if len(named) > 1 or layout not in LAYOUTS:
        raise config.error(f"version = {', '.join(sorted(named))}; read: {', '.join(LAYOUTS)}")
    group = "group_size" if "group_size" in config.values else "q_group_size"
    return Settings(layout, config.group_size(group))


def read(module: StoredModule, settings: Settings) -> Grouped:
    """Raises:
    CheckpointError: names the tensor, and what is wrong with it.
    """
    if settings.layout == "gemm":
        return _gemm(module, settings.group)
    if settings.layout == "gemv":
        return _gemv(module, settings.group)
    return _gemv_fast(module, settings)


def _gemm(module: StoredModule, group: int) -> Grouped:
    qweight = module.take("qweight", torch.int32, None, None)
    K, N = qweight.shape[0], qweight.shape[1] * 8
    module.check_matrix("qweight", N, K)
    group, groups = _groups(K, group)
    scales = module.take_floats("scales", groups, N)
    qzeros = module.take("qzeros", torch.int32, groups, N // 8)
    return Grouped(
        codes=_in_order(qweight).t().contiguous(),
        scale=scales.t().contiguous(),
        group=group,
        bits=BITS,
        zero_point=_in_order(qzeros).t().contiguous(),
    )


def _in_order(words: Tensor) -> Tensor:
    """The integers ``[R, 8 · W]`` of gemm's words ``[R, W]``."""
    nibbles = unpack(words, BITS, words.shape[1] * 8)
    return nibbles.unflatten(1, (-1, 8))[..., _PLACES].flatten(1)


def _gemv(module: StoredModule, group: int) -> Grouped:
    qweight = module.take("qweight", torch.int32, None, None)
    N, K = qweight.shape[0], qweight.shape[1] * 8
    module.check_matrix("qweight", N, K)
    group, groups = _groups(K, group)
    words = _words(K, group)
    qzeros = module.take("qzeros", torch.int32, N, words)
    scales = module.take_floats("scales", N, words * 8)
    return Grouped(
        codes=unpack(qweight, BITS, K),
        scale=scales[:, :groups].contiguous(),
        group=group,
        bits=BITS,
        zero_point=unpack(qzeros, BITS, groups),
    )


def _gemv_fast(module: StoredModule, settings: Settings) -> Grouped:
    qweight = module.take("qweight", torch.int16, None, None)
    N, K = qweight.shape[0] * _ROWS, qweight.shape[1]
    module.check_matrix("qweight", N, K)
    if K % _STEP:
        raise module.error("qweight", f"K={K} is no multiple of {_STEP}")
    group, groups = _groups(K, settings.group)
    words = _words(K, group)
    zeros = "scaled_zeros" if settings.layout == "llm-awq" else "qzeros"
    return Grouped(
        codes=_fast_codes(qweight),
        scale=module.take_floats("scales", words * 8, N)[:groups].t().contiguous(),
        group=group,
        bits=BITS,
        offset=module.take_floats(zeros, words * 8, N)[:groups].t().contiguous(),
    )


def _fast_codes(qweight: Tensor) -> Tensor:
    """``[N, K]`` of gemv_fast's words ``[N / 4, K]``.

    Word j of 64 along K holds a nibble of each of four rows, where these rows' own order is: for 64
    columns at a time the rows one after another, and of the 256 values word w has those from 4 · w on.
    Within 32 columns of a row the order is 0 1 8 9 16 17 24 25 2 3 ..., and of these eight by eight
    0 2 4 6 1 3 5 7.
    """
    N, K = qweight.shape[0] * _ROWS, qweight.shape[1]
    values = unpack(qweight, BITS, K * _ROWS)
    rows = values.view(N // _ROWS, K // _STEP, _ROWS, _STEP).transpose(1, 2).reshape(N, K)
    eights = rows.view(N, K // 8, 2, 4).transpose(2, 3).reshape(N, K // 32, 4, 4, 2)
    return eights.transpose(2, 3).reshape(N, K)


def _groups(K: int, group: int) -> tuple[int, int]:
    group = group or K
    return group, -(-K // group)


def _words(K: int, group: int) -> int:
    """How many words of eight groups gemv has room for in a row."""
    multiple = _PADDING.get(group, 1)
    words = (K // group + 7) // 8
    return (words + multiple - 1) // multiple * multiple
