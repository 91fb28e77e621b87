"""How far a variant's next-token distributions are from those of the float model."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
_ROWS = 32  # at a time in float64


@dataclass(frozen=True)
class Score:
    """Over all scored tokens; the divergences KL(reference ‖ variant) in nats.

    same_top_token: share of tokens whose most probable successor is the reference's.
    """

    mean_kl: float
    kl_99_percent: float
    same_top_token: float
    perplexity: float


@dataclass
class Tally:
    """Sums on the way to a Score."""

    kl: list[Float64] = field(default_factory=list)
    same: int = 0
    log_likelihood: float = 0.0

    def add(self, logits: Float32, reference: Float32, next_ids: NDArray[np.int64]) -> None:
        """logits, reference [tokens, vocab_size]; next_ids [tokens]: how the text goes on."""
        for start in range(0, len(logits), _ROWS):
            part = slice(start, start + _ROWS)
            ours, theirs = _log_softmax(logits[part]), _log_softmax(reference[part])
            self.kl.append((np.exp(theirs) * (theirs - ours)).sum(axis=1))
            self.same += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
            rows = np.arange(len(ours))
            self.log_likelihood += float(ours[rows, next_ids[part]].sum())

    def score(self) -> Score:
        """ZeroDivisionError if nothing was added."""
        kl = np.concatenate(self.kl)
        return Score(
            mean_kl=max(0.0, float(kl.mean())),
            kl_99_percent=max(0.0, float(np.percentile(kl, 99))),
            same_top_token=self.same / kl.size,
            perplexity=math.exp(min(700.0, -self.log_likelihood / kl.size)),
        )


def _log_softmax(logits: Float32) -> Float64:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))
