"""A plain text file → windows of token ids."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.config import ModelConfig
from edgelora.errors import EdgeLoraError
from edgelora.file_bytes import read_all
from edgelora.tokenizer import TokenizerFiles

POSITIONS = 512  # of a window, or what the base was made for


@dataclass(frozen=True)
class CalibrationText:
    """Parts of a text as the base reads it."""

    windows: NDArray[np.int64]  # token ids [windows, positions]
    sha256: str  # of the whole file

    def __str__(self) -> str:
        count, positions = self.windows.shape
        return f"{count} windows of {positions} tokens of the text sha256:{self.sha256}"


def read_calibration(
    file: Path, tokenizer: TokenizerFiles, config: ModelConfig, *, windows: int
) -> CalibrationText:
    """Windows spread evenly over the text. Raises EdgeLoraError."""
    ids = read_token_ids(file, tokenizer, config.vocab_size)
    positions = min(POSITIONS, config.max_position_embeddings)
    found = ids.size // positions
    if found < windows:
        raise EdgeLoraError(
            f"{file}: {ids.size} tokens: calibration takes {windows} windows of {positions}, so "
            f"at least {windows * positions}: give a longer text"
        )
    starts = np.arange(windows) * found // windows * positions
    chosen = ids[starts[:, None] + np.arange(positions)]
    return CalibrationText(chosen, hashlib.sha256(read_all(file)).hexdigest())


def read_token_ids(file: Path, tokenizer: TokenizerFiles, vocab_size: int) -> NDArray[np.int64]:
    """All of a UTF-8 text. Raises EdgeLoraError for another encoding, or an id beyond the model."""
    try:
        ids = np.array(tokenizer.encode(read_all(file).decode()), np.int64)
    except UnicodeDecodeError as error:
        raise EdgeLoraError(f"{file}: not UTF-8 at byte {error.start}: save it as such") from error
    if ids.size and ids.max() >= vocab_size:
        raise EdgeLoraError(
            f"{file}: the tokenizer makes token {ids.max()} of it: not below vocab_size "
            f"{vocab_size}"
        )
    return ids
