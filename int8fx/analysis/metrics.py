"""How far a model's answers are from a reference's: perplexity, KL divergence, top-1 agreement.

    perplexity       = exp(mean_t -log q(token_t | tokens before it))
    KL(p || q)       = sum_v p(v) · (log p(v) - log q(v)), at each position, in nats
    top-1 agreement  = share of positions at which p and q have the same most likely token

with p the reference's distribution and q the model's. A text is cut into windows and each window is
judged alone, so that one window's logits is all that is held of each model. A window that is one
token long would predict nothing, hence the lower bound of two.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

# From token ids [1, n] to logits [1, n, vocabulary], or [n, vocabulary].
LogitsOf = Callable[[Tensor], Tensor]

# Rows of logits that are turned into log-probabilities at a time: with a vocabulary of 256k, a
# whole window of 512 would take half a gigabyte for each temporary.
ROWS_AT_ONCE = 128


def sample_text() -> str:
    """The English text that ships with the package; see ``data/README.md``."""
    return (resources.files("int8fx") / "data" / "emma.txt").read_text(encoding="utf-8")


def windows(token_ids: Tensor, length: int, count: int | None = None) -> Tensor:
    """Cuts ``token_ids [T]`` into ``[W, length]``, without overlap; a remainder is dropped.

    Args:
        count: how many to take from the beginning; None for all.

    Raises:
        ValueError: a window is shorter than two tokens, or the text has too few tokens.
    """
    if length < 2:
        raise ValueError(f"a window of {length} tokens predicts nothing; at least 2 are needed")
    available = token_ids.numel() // length
    wanted = available if count is None else count
    if not 1 <= wanted <= available:
        raise ValueError(
            f"{wanted} windows of {length} tokens were asked for; the text has {available}"
        )
    return token_ids[: wanted * length].reshape(wanted, length)


def token_nll(logits: Tensor, token_ids: Tensor) -> Tensor:
    """-log q of each token given those before it: ``[n, V], [n] -> [n - 1]``, in nats, fp32."""
    parts = zip(logits[:-1].split(ROWS_AT_ONCE), token_ids[1:].split(ROWS_AT_ONCE), strict=True)
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(rows.float(), targets, reduction="none")
            for rows, targets in parts
        ]
    )


def token_kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model) at each position: ``[n, V], [n, V] -> [n]``, in nats, fp32."""
    parts = zip(reference.split(ROWS_AT_ONCE), logits.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([_kl(p.float(), q.float()) for p, q in parts])


def _kl(reference: Tensor, logits: Tensor) -> Tensor:
    return _divergence(reference.log_softmax(-1), logits)


def _divergence(log_p: Tensor, logits: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


class Reference:
    """Answers ``[n, V]`` that many others are compared with, as log-probabilities in fp32."""

    def __init__(self, logits: Tensor) -> None:
        self._log_p = [rows.float().log_softmax(-1) for rows in logits.split(ROWS_AT_ONCE)]

    def kl(self, logits: Tensor) -> Tensor:
        """``token_kl`` of the reference and these ``[n, V]``: ``[n]``."""
        parts = zip(self._log_p, logits.split(ROWS_AT_ONCE), strict=True)
        return torch.cat([_divergence(log_p, rows.float()) for log_p, rows in parts])


@dataclass(frozen=True)
class Accuracy:
    """What one model scored over all windows.

    Attributes:
        tokens: how many predictions the perplexity is a mean over.
        perplexity: of the text.
        mean_kl, p99_kl, max_kl: over all positions, against the reference, in nats.
        top1: agreement with the reference, 0 to 1.
    """

    tokens: int
    perplexity: float
    mean_kl: float
    p99_kl: float
    max_kl: float
    top1: float


class _Tally:
    """Per-token numbers of one model, window by window."""

    def __init__(self) -> None:
        self._nll: list[Tensor] = []
        self._kl: list[Tensor] = []
        self._agrees: list[Tensor] = []

    def add(self, reference: Tensor, logits: Tensor, token_ids: Tensor) -> None:
        self._nll.append(token_nll(logits, token_ids).cpu())
        self._kl.append(token_kl(reference, logits).cpu())
        self._agrees.append((reference.argmax(-1) == logits.argmax(-1)).cpu())

    def accuracy(self) -> Accuracy:
        nll, kl, agrees = (torch.cat(parts) for parts in (self._nll, self._kl, self._agrees))
        # In float64: thousands of small terms, and nothing here is worth a rounding error.
        return Accuracy(
            tokens=nll.numel(),
            perplexity=math.exp(nll.double().mean()),
            mean_kl=kl.double().mean().item(),
            p99_kl=kl.double().quantile(0.99).item(),
            max_kl=kl.max().item(),
            top1=agrees.double().mean().item(),
        )


def compare(
    reference: LogitsOf,
    models: Mapping[str, LogitsOf],
    token_windows: Tensor,
    on_window: Callable[[int], None] = lambda done: None,
) -> dict[str, Accuracy]:
    """Scores every model against the reference on the same windows.

    Args:
        reference: what the others are compared with.
        models: by name. A value that *is* ``reference`` is not run a second time.
        token_windows: ``[W, n]``, see ``windows``.
        on_window: told how many windows are done.

    Returns:
        The accuracies, by name.
    """
    tallies = {name: _Tally() for name in models}
    with torch.no_grad():
        for done, token_ids in enumerate(token_windows, start=1):
            expected = _rows(reference(token_ids[None]))
            for name, model in models.items():
                logits = expected if model is reference else _rows(model(token_ids[None]))
                tallies[name].add(expected, logits, token_ids)
            on_window(done)
    return {name: tally.accuracy() for name, tally in tallies.items()}


def _rows(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])
