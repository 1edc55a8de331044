"""GGUF's names of tensors, and their rows' order, as the models of transformers have them.

llama.cpp's converter renames tensors, and for ``llama`` it interleaves the two halves of each head in
the rows of q and k: row ``2 · i + j`` of a head is row ``i + j · d / 2`` of transformers' model.
"""

from torch import Tensor

from int8fx.errors import CheckpointError
from int8fx.weights.readers.container import Entry
from int8fx.weights.readers.gguf_file import GgufFile

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Of which architectures the names are these, and whether heads are interleaved.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}
_COMPUTED = "rope_freqs.weight"


class Renamed:
    """A GGUF file under the names of transformers' model: a container as the file is.

    Raises:
        CheckpointError: the architecture is not known, or a name of it.
    """

    def __init__(self, file: GgufFile) -> None:
        self.path, self.config, self.metadata = file.path, file.config, file.metadata
        architecture = file.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(
                f"{file.path}: general.architecture = {architecture!r}; names are known of: {known}"
            )
        self._interleaved = ARCHITECTURES[architecture]
        self._file = file
        self._names = {self._renamed(name): name for name in file.entries if name != _COMPUTED}
        self.entries: dict[str, Entry] = {
            ours: file.entries[name] for ours, name in self._names.items()
        }

    def _renamed(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem in _TOP:
            return f"{_TOP[stem]}.{kind}"
        parts = stem.split(".")
        if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _BLOCK:
            return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{kind}"
        raise CheckpointError(f"{self.path}: {name}: a tensor that the architecture has not")

    def tensor(self, name: str) -> Tensor:
        return self.in_order(name, self.mapped(name))

    def mapped(self, name: str) -> Tensor:
        """A tensor as it is in the file."""
        return self._file.tensor(self._names[name])

    def in_order(self, name: str, rows: Tensor) -> Tensor:
        """Its rows as transformers' model has them."""
        if self._interleaved and ".self_attn.q_proj." in name:
            return self._by_halves(rows, "attention.head_count")
        if self._interleaved and ".self_attn.k_proj." in name:
            return self._by_halves(rows, "attention.head_count_kv")
        return rows

    def release(self, name: str) -> None:
        self._file.release(name)

    def _by_halves(self, rows: Tensor, key: str) -> Tensor:
        """The rows of each head with its halves one after the other; blocks lie within a row."""
        architecture = self.metadata["general.architecture"]
        heads = self.metadata.get(f"{architecture}.{key}")
        if heads is None:
            heads = self.metadata.get(f"{architecture}.attention.head_count")
        if type(heads) is not int or heads < 1 or rows.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{self.path}: {architecture}.{key} = {heads!r} does not divide the rows"
            )
        return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
