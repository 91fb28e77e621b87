"""The text that an evaluation reads: a file of the user's, or one that comes with EdgeLoRA."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.calibration import read_token_ids
from edgelora.errors import EdgeLoraError
from edgelora.tokenizer import TokenizerFiles

BUILT_IN = Path(__file__).parent / "text.txt"
FEWEST = 16  # tokens; an evaluation of fewer says nothing


@dataclass(frozen=True)
class TextDescription:
    """Which text, and how much of it."""

    name: str
    sha256: str  # of the whole file
    windows: int
    positions: int  # tokens of a window
    tokens_scored: int


@dataclass(frozen=True)
class EvaluationText:
    """Windows of a text as the base reads it; the second half of each is scored."""

    windows: NDArray[np.int64]  # token ids [windows, positions]
    name: str
    sha256: str  # of the whole file

    @property
    def first_scored(self) -> int:
        """The logits of this position and all after it, but the last, are scored."""
        return int(self.windows.shape[1]) // 2

    @property
    def description(self) -> TextDescription:
        """All of it but the tokens."""
        windows, positions = self.windows.shape
        return TextDescription(self.name, self.sha256, windows, positions, self.tokens_scored)

    @property
    def tokens_scored(self) -> int:
        windows, positions = self.windows.shape
        return int(windows) * (int(positions) - 1 - self.first_scored)


def read_evaluation_text(
    file: Path | None,
    tokenizer: TokenizerFiles,
    vocab_size: int,
    *,
    windows: int,
    positions: int,
) -> EvaluationText:
    """The first `windows` of the text, fewer if it is shorter; no file: the built-in text.

    A text shorter than `positions` is one window. Raises EdgeLoraError.
    """
    path = file or BUILT_IN
    ids = read_token_ids(path, tokenizer, vocab_size)
    length = min(positions, ids.size)
    if length < FEWEST:
        raise EdgeLoraError(f"{path}: {length} tokens at a time: an evaluation needs {FEWEST}")
    count = min(windows, ids.size // length)
    chosen = ids[: count * length].reshape(count, length)
    name = path.name if file else "built-in"
    return EvaluationText(chosen, name, hashlib.sha256(path.read_bytes()).hexdigest())
