"""The static KV cache of an artefact: which tokens it has, and the memory that programs write to."""

import ctypes
import itertools
from collections.abc import Mapping, Sequence

from int8fx.ahead.artefact import Buffer
from int8fx.ahead.mapped import Memory, Zeros


class Cache:
    """Keys and values of up to ``context`` tokens.

    Attributes:
        memory: of each buffer, by its name.
    """

    def __init__(self, buffers: Mapping[str, Buffer], context: int) -> None:
        self._context = context
        self._tokens: list[int] = []
        self._zeros = {name: Zeros(each.nbytes) for name, each in buffers.items()}
        self.memory = {
            name: Memory(self._zeros[name].address, each.dtype, each.shape)
            for name, each in buffers.items()
        }
        self._counts = [
            ctypes.c_int64.from_address(self.memory[name].address)
            for name, each in buffers.items()
            if each.counts
        ]

    @property
    def is_full(self) -> bool:
        return len(self._tokens) == self._context

    def unknown(self, tokens: Sequence[int]) -> list[int]:
        """What of a text the cache has not; what it has of another one is dropped.

        The last token always is unknown: what follows it was not kept.
        """
        pairs = zip(self._tokens, tokens[:-1], strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        del self._tokens[common:]
        # Entries behind the count are masked, and written over by what comes.
        for count in self._counts:
            count.value = common
        return list(tokens[common:])

    def add(self, tokens: Sequence[int]) -> None:
        """Tokens that a program has written; it has counted them itself."""
        self._tokens += tokens
