"""Writers of other systems' files, from their published layouts and apart from int8fx's readers.

Each takes integers, scales and zero points and gives the tensors that a file holds of one module. They
pack by whole numbers of Python and by loops, where the readers shift tensors: what one of the two gets
wrong, the other does not get wrong in the same way.

``Foreign.w_hat`` is what the weight stands for, computed in float64 from what was given.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Foreign:
    """A module as a file holds it.

    Attributes:
        tensors: by their names behind the module's.
        w_hat: ``[N, K]`` float64.
        config: the file's ``quantization_config``.
        others: more files, by name, and their JSON; of the module ``PATH`` stands for its path.
        metadata: of the header of the file, with the same.
    """

    tensors: dict[str, Tensor]
    w_hat: Tensor
    config: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


# --- numbers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """Integers ``[N, K]``, scales and zero points ``[N, G]`` and the group of each column."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    g_idx: Tensor

    @property
    def w_hat(self) -> Tensor:
        groups = self.g_idx.long()
        steps = self.codes.double() - self.zero_point.double()[:, groups]
        return steps * self.scale.double()[:, groups]


def numbers(
    N: int,
    K: int,
    bits: int,
    group: int,
    *,
    act_order: bool = False,
    symmetric: bool = False,
    seed: int = 0,
) -> Numbers:
    """Random ones, of every code and every zero point from 1 on."""
    random = torch.Generator().manual_seed(seed)
    groups = -(-K // group)
    codes = torch.randint(0, 2**bits, (N, K), generator=random, dtype=torch.uint8)
    zero_point = torch.randint(1, 2**bits, (N, groups), generator=random, dtype=torch.uint8)
    if symmetric:
        zero_point = torch.full((N, groups), 2 ** (bits - 1), dtype=torch.uint8)
    scale = (torch.rand(N, groups, generator=random) * 0.02 + 0.005).half()
    g_idx = torch.arange(K, dtype=torch.int32) // group
    if act_order:
        g_idx = g_idx[torch.randperm(K, generator=random)]
    return Numbers(codes, scale, zero_point, g_idx)


def stream(values: Sequence[int], bits: int, words: int) -> list[int]:
    """Integers one after another, low bits first, as ``words`` signed 32-bit words."""
    whole = sum(int(value) << (bits * index) for index, value in enumerate(values))
    return np.frombuffer(whole.to_bytes(words * 4, "little"), dtype="<i4").tolist()


def _words(count: int, bits: int) -> int:
    return (count * bits + 31) // 32


def streams(rows: Tensor, bits: int) -> Tensor:
    """Each row as a stream: ``[R, C]`` to ``[R, words]`` int32."""
    words = _words(rows.shape[1], bits)
    return torch.tensor([stream(row, bits, words) for row in rows.tolist()], dtype=torch.int32)


# --- GPTQ and AWQ ----------------------------------------------------------------------------------


def gptq(
    given: Numbers, bits: int, group: int, *, version: int = 1, bias: Tensor | None = None
) -> Foreign:
    """Version 1 stores a zero point less one."""
    stored = given.zero_point.int() - 1 if version == 1 else given.zero_point.int()
    tensors = {
        "qweight": streams(given.codes, bits).t().contiguous(),
        "qzeros": streams(stored.t(), bits),
        "scales": given.scale.t().contiguous(),
        "g_idx": given.g_idx,
    }
    if bias is not None:
        tensors["bias"] = bias
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if group >= given.codes.shape[1] else group,
        "desc_act": bool((given.g_idx.diff() < 0).any()),
        "sym": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Foreign(tensors, given.w_hat, config)


_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq_words(rows: Tensor) -> Tensor:
    """Nibble i of a word is column ``_AWQ_ORDER[i]`` of eight."""
    found = []
    for row in rows.tolist():
        eights = [row[start : start + 8] for start in range(0, len(row), 8)]
        found.append([stream([eight[place] for place in _AWQ_ORDER], 4, 1)[0] for eight in eights])
    return torch.tensor(found, dtype=torch.int32)


def awq_gemm(given: Numbers, group: int) -> Foreign:
    tensors = {
        "qweight": _awq_words(given.codes.t()),
        "qzeros": _awq_words(given.zero_point.t()),
        "scales": given.scale.t().contiguous(),
    }
    return Foreign(tensors, given.w_hat, _awq_config("gemm", group))


def _awq_config(version: str, group: int) -> dict[str, Any]:
    names = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    return names | {"version": version}


def _awq_width(K: int, group: int) -> int:
    """Words of eight groups that a row has room for."""
    multiple = {64: 2, 32: 4, 16: 8}.get(group, 1)
    words = (K // group + 7) // 8
    return (words + multiple - 1) // multiple * multiple


def awq_gemv(given: Numbers, group: int) -> Foreign:
    N, K = given.codes.shape
    width = _awq_width(K, group)
    scales = torch.zeros(N, width * 8, dtype=torch.float16)
    scales[:, : given.scale.shape[1]] = given.scale
    zeros = torch.zeros(N, width * 8, dtype=torch.uint8)
    zeros[:, : given.scale.shape[1]] = given.zero_point
    tensors = {"qweight": streams(given.codes, 4), "qzeros": streams(zeros, 4), "scales": scales}
    return Foreign(tensors, given.w_hat, _awq_config("gemv", group))


def awq_gemv_fast(given: Numbers, group: int, *, llm_awq: bool = False) -> Foreign:
    """Of four rows and 64 columns 64 words: value ``v`` of the 256, row after row, is nibble ``v % 4``
    of word ``v // 4``. In a row, 32 columns are in the order 0 1 8 9 16 17 24 25 2 3 10 ..., of which
    then each eight are in the order 0 2 4 6 1 3 5 7."""
    N, K = given.codes.shape
    pairs = [8 * i + 2 * j + p for j in range(4) for i in range(4) for p in range(2)]
    order = [pairs[8 * eight + place] for eight in range(4) for place in _AWQ_ORDER]
    qweight = np.zeros((N // 4, K), dtype=np.uint16)
    codes = given.codes.numpy().astype(np.uint16)
    for rows in range(N // 4):
        for start in range(0, K, 64):
            values = [
                codes[4 * rows + r, start + 32 * half + place]
                for r in range(4)
                for half in range(2)
                for place in order
            ]
            for index, value in enumerate(values):
                qweight[rows, start + index // 4] |= value << (4 * (index % 4))
    width = _awq_width(K, group)
    scales = torch.zeros(width * 8, N, dtype=torch.float16)
    zeros = torch.zeros(width * 8, N, dtype=torch.float16)
    groups = given.scale.shape[1]
    scales[:groups] = given.scale.t()
    zeros[:groups] = -(given.scale.float() * given.zero_point.float()).half().t()
    offset = zeros[:groups].t().double()[:, given.g_idx.long()]
    w_hat = given.codes.double() * given.scale.double()[:, given.g_idx.long()] + offset
    words = torch.from_numpy(qweight.view(np.int16).copy())
    name = "scaled_zeros" if llm_awq else "qzeros"
    config = _awq_config("llm-awq" if llm_awq else "gemv_fast", group)
    return Foreign({"qweight": words, name: zeros, "scales": scales}, w_hat, config)


# --- EETQ ------------------------------------------------------------------------------------------


def eetq(w_int8: Tensor, scale: Tensor) -> Foreign:
    """``preprocess_weights_for_mixed_gemm`` of ``w_int8ᵀ [K, N]``, element by element."""
    N, K = w_int8.shape
    matrix = w_int8.t().numpy()  # [K, N]
    within = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
    permuted = np.empty_like(matrix)
    for row in range(K):
        permuted[row] = matrix[row // 16 * 16 + within[row % 16]]
    columns = permuted.T  # column after column
    interleaved = np.empty(N * K, dtype=np.int16)
    for n in range(N):
        for k in range(K):
            tile, place = k // 64, k % 64
            interleaved[n // 2 * 2 * K + tile * 128 + n % 2 * 64 + place] = columns[n, k]
    unsigned = (interleaved + 128).astype(np.uint8)
    swapped = unsigned.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(K, N)
    tensors = {"weight": torch.from_numpy(swapped.copy()).view(torch.int8), "weight_scales": scale}
    w_hat = w_int8.double() * scale.double().unsqueeze(1)
    return Foreign(tensors, w_hat, {"quant_method": "eetq", "weights": "int8"})


# --- bitsandbytes ----------------------------------------------------------------------------------


def bitsandbytes(
    codes: Tensor, codebook: Tensor, absmax: Tensor, kind: str, block: int, nested: tuple | None = None
) -> Foreign:
    """``nested``: uint8 codes ``[blocks]``, their codebook, absmax and offset, in absmax's place."""
    N, K = codes.shape
    values = codes.flatten().tolist()
    values += [0] * (len(values) % 2)
    packed = [values[i] * 16 + values[i + 1] for i in range(0, len(values), 2)]
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": [N, K],
    }
    tensors = {
        "weight": torch.tensor(packed, dtype=torch.uint8).unsqueeze(1),
        "weight.absmax": absmax,
        "weight.quant_map": codebook,
    }
    if nested is not None:
        of_absmax, dynamic, largest, offset = nested
        tensors |= {
            "weight.absmax": of_absmax,
            "weight.nested_quant_map": dynamic,
            "weight.nested_absmax": largest,
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        which = torch.arange(len(of_absmax)) // 256
        absmax = dynamic[of_absmax.long()] * largest[which] + offset
    said = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = said
    blocks = torch.arange(N * K) // block
    w_hat = (codebook[codes.flatten().long()] * absmax[blocks]).view(N, K).double()
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return Foreign(tensors, w_hat, config)


def nf4_state(N: int, K: int) -> Tensor:
    """What says the shape and the blocks of an NF4 weight."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [N, K]}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


# --- HQQ -------------------------------------------------------------------------------------------


def hqq(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, axis: int) -> Foreign:
    """``codes [N, K]``; ``scale`` and ``zero`` one for each group, in HQQ's order."""
    N, K = codes.shape
    rows = codes.reshape(-1, group) if axis == 1 else codes.reshape(group, -1)
    shape = (-1, 1) if axis == 1 else (1, -1)
    scale, zero = scale.reshape(shape), zero.reshape(shape)
    w_hat = ((rows.double() - zero.double()) * scale.double()).reshape(N, K)
    words = {"shape": [N, K], "nbits": bits, "group_size": group, "axis": axis}
    tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in words.items()}
    flags = {"view_as_float": 0, "offload_meta": 0, "channel_wise": 1, "optimize": 1, "round_zero": 0}
    flags |= {"encoded_state_dict": 1, "stores_quant_config": 1}
    tensors |= {name: torch.tensor(value, dtype=torch.uint8) for name, value in flags.items()}
    packing = "3bit_32" if bits == 3 else f"{8 if bits in (5, 6) else bits}bit_u8"
    tensors["packing"] = torch.tensor(list(packing.encode()), dtype=torch.uint8)
    tensors |= {"W_q": _hqq_packed(rows, bits), "scale": scale, "zero": zero}
    return Foreign(tensors, w_hat, {"quant_method": "hqq"})


def _hqq_packed(rows: Tensor, bits: int) -> Tensor:
    if bits in (8, 6, 5):
        return rows.to(torch.uint8)
    parts = 10 if bits == 3 else 8 // bits
    padded = torch.zeros(-(-len(rows) // parts) * parts, rows.shape[1], dtype=torch.int32)
    padded[: len(rows)] = rows.int()
    step = len(padded) // parts
    packed = torch.zeros(step, rows.shape[1], dtype=torch.int32)
    for part in range(parts):
        # The first part is in the highest bits: of 30 in a word, and of all in a byte.
        packed += padded[part * step : (part + 1) * step] * 2 ** (bits * (parts - 1 - part))
    return packed if bits == 3 else packed.to(torch.uint8)


# --- quanto ----------------------------------------------------------------------------------------


def quanto(codes: Tensor, scale: Tensor, shift: Tensor | None, bits: int) -> Foreign:
    """``codes [N, K]`` int8 of 8 bits, or uint8; ``scale`` and ``shift [N, G]``."""
    K = codes.shape[1]
    groups = torch.arange(K) // (K // scale.shape[1])
    w_hat = codes.double() * scale.double()[:, groups]
    tensors = {"input_scale": torch.ones(()), "output_scale": torch.ones(())}
    if shift is None:
        tensors |= {"weight._data": codes, "weight._scale": scale}
    else:
        packed = _quanto_packed(codes.reshape(-1, K // scale.shape[1]), bits)
        tensors |= {"weight._data._data": packed, "weight._scale": scale.reshape(-1, 1)}
        tensors["weight._shift"] = shift.reshape(-1, 1)
        if shift.is_floating_point():
            w_hat = w_hat - shift.double()[:, groups]
        else:
            w_hat = (codes.double() - shift.double()[:, groups]) * scale.double()[:, groups]
    said = {"PATH": {"weights": f"qint{bits}", "activations": "none"}}
    return Foreign(tensors, w_hat, others={"quanto_qmap.json": said})


def _quanto_packed(rows: Tensor, bits: int) -> Tensor:
    """The first rows in the low bits of a byte."""
    parts = 8 // bits
    step = -(-len(rows) // parts)
    packed = torch.zeros(step, rows.shape[1], dtype=torch.int32)
    for index, row in enumerate(rows.int()):
        packed[index % step] += row * 2 ** (bits * (index // step))
    return packed.to(torch.uint8)


# --- compressed-tensors ----------------------------------------------------------------------------


def compressed_tensors(
    given: Numbers,
    bits: int,
    group: int,
    *,
    packed: bool = True,
    symmetric: bool = True,
    act_order: bool = False,
    activations: bool = False,
) -> Foreign:
    """Of codes from 0 on; packed these are stored, plain ones less 2^(bits - 1)."""
    N, K = given.codes.shape
    middle = 2 ** (bits - 1)
    tensors = {"weight_scale": given.scale.bfloat16()}
    if packed:
        tensors["weight_packed"] = streams(given.codes, bits)
        tensors["weight_shape"] = torch.tensor([N, K])
    else:
        tensors["weight"] = (given.codes.int() - middle).to(torch.int8)
    zero_point = given.zero_point
    if symmetric:
        zero_point = torch.full_like(zero_point, middle)
    elif packed:
        tensors["weight_zero_point"] = streams(zero_point.t(), bits).t().contiguous()
    else:
        tensors["weight_zero_point"] = (zero_point.int() - middle).to(torch.int8)
    if act_order:
        tensors["weight_g_idx"] = given.g_idx
    strategy = "channel" if group >= K else "group"
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": strategy, "group_size": group if strategy == "group" else None}
    weights |= {"actorder": "group"} if act_order else {}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": inputs if activations else None,
            "output_activations": None,
        }
    }
    form = "pack-quantized" if packed else "int-quantized"
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    config |= {"quantization_status": "compressed", "ignore": ["lm_head"]}
    numbers = Numbers(given.codes, tensors["weight_scale"], zero_point, given.g_idx)
    return Foreign(tensors, numbers.w_hat, config)


# --- torchao ---------------------------------------------------------------------------------------


def torchao_intx(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Foreign:
    """``codes [N, K]`` int8, ``scale`` and ``zero_point [N, G]``."""
    group = codes.shape[1] // scale.shape[1]
    fields = {
        "target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"},
        "block_size": [1, group],
        "dtype": {"_type": "torch.dtype", "_data": str(scale.dtype).removeprefix("torch.")},
        "activation_quantization": None,
    }
    tensors = {"qdata": codes, "scale": scale, "zero_point": zero_point}
    groups = torch.arange(codes.shape[1]) // group
    w_hat = (codes.double() - zero_point.double()[:, groups]) * scale.double()[:, groups]
    return _torchao("IntxUnpackedToInt8Tensor", fields, tensors, w_hat)


def torchao_int4(codes: Tensor, scale: Tensor, zero: Tensor) -> Foreign:
    """``codes [N, K]`` from -8 to 7, ``scale`` and ``zero [N, G]``, the second in the weight's unit."""
    N, K = codes.shape
    group = K // scale.shape[1]
    nibbles = codes.int() % 16
    packed = (nibbles[:, ::2] + 16 * nibbles[:, 1::2]).to(torch.uint8).view(torch.int8)
    tensors = {"qdata": packed, "scale": scale.t().contiguous(), "zero_point": zero.t().contiguous()}
    groups = torch.arange(K) // group
    w_hat = codes.double() * scale.double()[:, groups] + zero.double()[:, groups]
    return _torchao("Int4Tensor", {"block_size": [1, group], "shape": [N, K]}, tensors, w_hat)


def torchao_int8(codes: Tensor, scale: Tensor) -> Foreign:
    """``codes [N, K]`` int8, ``scale [N, 1]``."""
    fields = {
        "block_size": [1, codes.shape[1]],
        "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
        "act_quant_kwargs": None,
    }
    w_hat = codes.double() * scale.double()
    return _torchao("Int8Tensor", fields, {"qdata": codes, "scale": scale}, w_hat)


def _torchao(kind: str, fields: dict, tensors: dict[str, Tensor], w_hat: Tensor) -> Foreign:
    said = json.dumps({"_type": kind, "_data": fields, "_tensor_data_names": list(tensors)})
    named = {f"_weight_{name}": tensor for name, tensor in tensors.items()}
    metadata = {"PATH.weight": said, "tensor_names": json.dumps(["PATH.weight"])}
    return Foreign(named, w_hat, {"quant_method": "torchao"}, metadata=metadata)


# --- FP8 and MXFP4 ---------------------------------------------------------------------------------


def fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Foreign:
    """``weight [N, K]`` float8_e4m3fn, ``scale`` one for each block."""
    N, K = weight.shape
    rows, columns = torch.arange(N) // block[0], torch.arange(K) // block[1]
    w_hat = weight.double() * scale.double()[rows][:, columns]
    config = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    return Foreign({"weight": weight, "weight_scale_inv": scale}, w_hat, config)


def mxfp4(codes: Tensor, exponents: Tensor) -> Foreign:
    """``codes [N, K]`` of four bits, ``exponents [N, K / 32]`` uint8."""
    N, K = codes.shape
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()
    values = torch.cat([values, -values])
    factor = 2.0 ** (exponents.double() - 127)
    w_hat = values[codes.long()] * factor.repeat_interleave(32, 1)
    blocks = codes.view(N, K // 32, 16, 2)
    packed = blocks[..., 0] + 16 * blocks[..., 1]
    tensors = {"weight_blocks": packed.to(torch.uint8), "weight_scales": exponents}
    return Foreign(tensors, w_hat, {"quant_method": "mxfp4"})


# --- ComfyUI ---------------------------------------------------------------------------------------


def comfyui(w_int8: Tensor, scale: Tensor, block: int = 0) -> Foreign:
    """``block``: of a rotation by the regular Hadamard matrix; 0: none."""
    said: dict[str, Any] = {"format": "int8_tensorwise"}
    w_hat = w_int8.double() * scale.double().view(-1, 1)
    if block:
        said |= {"convrot": True, "convrot_groupsize": block, "per_row": True}
        H = factor = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double()
        while len(H) < block:
            H = torch.kron(H, factor)
        w_hat = (w_hat.unflatten(1, (-1, block)) @ H / block**0.5).flatten(1)
    marker = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return Foreign({"weight": w_int8, "weight_scale": scale, "comfy_quant": marker}, w_hat)


# --- files -----------------------------------------------------------------------------------------


def write(
    folder: Path,
    modules: Mapping[str, Foreign],
    plain: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    **changed: Any,
) -> Path:
    """A checkpoint of some modules and other tensors.

    Args:
        config: of the model, into ``config.json``.
        changed: options of its ``quantization_config``, in the place of the first module's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(plain)
    others: dict[str, dict[str, Any]] = {}
    metadata: dict[str, str] = {"format": "pt"}
    for path, foreign in modules.items():
        tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in foreign.tensors.items()}
        for name, said in foreign.others.items():
            others.setdefault(name, {}).update(_of_module(said, path))
        metadata |= {name.replace("PATH", path): said for name, said in foreign.metadata.items()}
    if "tensor_names" in metadata:
        metadata["tensor_names"] = json.dumps([f"{path}.weight" for path in modules])
    save_file(
        {name: each.clone() for name, each in tensors.items()}, folder / "model.safetensors", metadata
    )
    first = next(iter(modules.values()))
    quantization = {"quantization_config": {**first.config, **changed}} if first.config else {}
    (folder / "config.json").write_text(json.dumps({**(config or {}), **quantization}))
    for name, said in others.items():
        (folder / name).write_text(json.dumps(said))
    return folder


def _of_module(said: Mapping[str, Any], path: str) -> dict[str, Any]:
    return {key.replace("PATH", path): value for key, value in said.items()}


Writer = Callable[[int, int], Foreign]


def samples() -> dict[str, Writer]:
    """A writer for each format, by a readable name: of N and K to a module with random numbers."""

    def of(bits: int, group: int, make: Callable[..., Foreign], act_order: bool = False) -> Writer:
        def writer(N: int, K: int) -> Foreign:
            return make(numbers(N, K, bits, min(group, K), act_order=act_order))

        return writer

    def ints(N: int, K: int, low: int = -128, high: int = 128) -> Tensor:
        random = torch.Generator().manual_seed(1)
        return torch.randint(low, high, (N, K), generator=random, dtype=torch.int8)

    def scales(N: int, groups: int) -> Tensor:
        return torch.rand(N, groups, generator=torch.Generator().manual_seed(2)) * 0.02 + 0.005

    def hqq_of(bits: int, axis: int) -> Writer:
        def writer(N: int, K: int) -> Foreign:
            codes = (ints(N, K).int() + 128).remainder(2**bits).to(torch.uint8)
            count = N * K // 16
            zero = scales(1, count) * 2**bits * 40
            return hqq(codes, scales(1, count).half(), zero.half(), bits, 16, axis)

        return writer

    def quanto_of(bits: int, integer: bool = False) -> Writer:
        def writer(N: int, K: int) -> Foreign:
            if bits == 8:
                return quanto(ints(N, K), scales(N, 1), None, 8)
            codes = ints(N, K, 0, 2**bits).to(torch.uint8)
            shift = scales(N, K // 32) * 2**bits / 2
            if integer:
                shift = ints(N, K // 32, 0, 2**bits)
            return quanto(codes, scales(N, K // 32), shift, bits)

        return writer

    def nf4_of(kind: str, nested: bool) -> Writer:
        def writer(N: int, K: int) -> Foreign:
            from int8fx.kernels.formats.codebook import CODEBOOKS

            codes = ints(N, K, 0, 16).to(torch.uint8)
            count = -(-N * K // 64)
            second = None
            if nested:
                dynamic = torch.linspace(-1, 1, 256)
                second = (
                    ints(1, count)[0].view(torch.uint8),
                    dynamic,
                    scales(1, -(-count // 256))[0],
                    0.0625,
                )
            codebook = torch.tensor(CODEBOOKS[kind], dtype=torch.float32)
            return bitsandbytes(codes, codebook, scales(1, count)[0], kind, 64, second)

        return writer

    def ct_of(bits: int, group: int, **how: bool) -> Writer:
        def writer(N: int, K: int) -> Foreign:
            act_order = how.get("act_order", False)
            given = numbers(N, K, bits, min(group, K), act_order=act_order)
            return compressed_tensors(given, bits, group, **how)

        return writer

    return {
        **{
            f"gptq-{bits}-v{version}": of(
                bits, 32, lambda given, bits=bits, v=version: gptq(given, bits, 32, version=v)
            )
            for bits in (2, 3, 4, 8)
            for version in (1, 2)
        },
        "gptq-act-order": of(4, 16, lambda given: gptq(given, 4, 16), True),
        "gptq-channel": of(4, 1 << 20, lambda given: gptq(given, 4, 1 << 20)),
        "awq-gemm": of(4, 32, lambda given: awq_gemm(given, 32)),
        "awq-gemv": of(4, 32, lambda given: awq_gemv(given, 32)),
        "awq-gemv-fast": of(4, 32, lambda given: awq_gemv_fast(given, 32)),
        "llm-awq": of(4, 64, lambda given: awq_gemv_fast(given, 64, llm_awq=True)),
        "nf4": nf4_of("nf4", False),
        "nf4-nested": nf4_of("nf4", True),
        "fp4": nf4_of("fp4", False),
        "eetq": lambda N, K: eetq(ints(N, K), scales(N, 1).squeeze(1).half()),
        **{f"hqq-{bits}-axis{axis}": hqq_of(bits, axis) for bits in (1, 2, 3, 4, 8) for axis in (0, 1)},
        "quanto-8": quanto_of(8),
        "quanto-4": quanto_of(4),
        "quanto-2": quanto_of(2),
        "quanto-4-integer": quanto_of(4, integer=True),
        "compressed-tensors-w4a16": ct_of(4, 32),
        "compressed-tensors-w4a16-zeros": ct_of(4, 32, symmetric=False),
        "compressed-tensors-w4a16-act-order": ct_of(4, 32, symmetric=False, act_order=True),
        "compressed-tensors-w8a16": ct_of(8, 32),
        "compressed-tensors-w3a16": ct_of(3, 32, symmetric=False),
        "compressed-tensors-w8a8": ct_of(8, 1 << 20, packed=False, activations=True),
        "compressed-tensors-w8a8-zeros": ct_of(
            8, 1 << 20, packed=False, symmetric=False, activations=True
        ),
        "torchao-intx-4": lambda N, K: torchao_intx(
            ints(N, K, -8, 8), scales(N, K // 32).bfloat16(), ints(N, K // 32, -8, 8), 4
        ),
        "torchao-int4": lambda N, K: torchao_int4(
            ints(N, K, -8, 8), scales(N, K // 32).bfloat16(), (scales(N, K // 32) - 0.015).bfloat16()
        ),
        "torchao-int8": lambda N, K: torchao_int8(ints(N, K), scales(N, 1).bfloat16()),
        "fp8": lambda N, K: fp8(
            (scales(N, K) * 1e4).to(torch.float8_e4m3fn), scales(-(-N // 32), -(-K // 32)), (32, 32)
        ),
        "mxfp4": lambda N, K: mxfp4(
            ints(N, K, 0, 16).to(torch.uint8), ints(N, K // 32, 110, 127).to(torch.uint8)
        ),
        "comfyui": lambda N, K: comfyui(ints(N, K), scales(N, 1).squeeze(1)),
        "comfyui-convrot": lambda N, K: comfyui(ints(N, K, -127, 128), scales(N, 1).squeeze(1), 64),
    }
