"""The fingerprint of a base: over its source tensors and vocabulary, the same for every format."""

import hashlib
import json
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgelora.checkpoint.protocol import Checkpoint


class Vocabulary(Protocol):
    """What the fingerprint needs of a tokenizer."""

    def vocabulary(self) -> Mapping[str, int]:
        """Token → id, added tokens included."""


class FingerprintBuilder:
    """Takes the tensors in any order, while they are read for something else."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, name: str, values: NDArray[np.float32]) -> None:
        """One source tensor under its Hugging Face name. Safe from several threads."""
        if name in self._lines:
            raise ValueError(f"{name} was added already")
        data = np.ascontiguousarray(values, dtype="<f4")
        dims = "x".join(map(str, values.shape))
        self._lines[name] = f"{name} {dims} {hashlib.sha256(data.data).hexdigest()}"

    def finish(self, tokenizer: Vocabulary) -> str:
        """`sha256:` + 64 hex digits."""
        tensors = [self._lines[name] for name in sorted(self._lines)]
        return _sha256(["edgelora-base 1", *tensors, f"tokenizer {_hash_vocabulary(tokenizer)}"])


def base_fingerprint(checkpoint: Checkpoint, tokenizer: Vocabulary) -> str:
    """Of a base that is read for nothing else. `sha256:` + 64 hex digits."""
    builder = FingerprintBuilder()
    for name in checkpoint.names():
        builder.add(name, checkpoint.read(name))
    return builder.finish(tokenizer)


def merged_fingerprint(base: str, adapter: str) -> str:
    """The fingerprint of a base into which the adapter with that source fingerprint is merged."""
    return _sha256(["edgelora-merged 1", base, adapter])


def _hash_vocabulary(tokenizer: Vocabulary) -> str:
    """Over `<id> <token as JSON string>`, JSON without \\u escapes for what UTF-8 can say."""
    entries = sorted((number, token) for token, number in tokenizer.vocabulary().items())
    lines = [f"{number} {json.dumps(token, ensure_ascii=False)}" for number, token in entries]
    return _sha256(lines).removeprefix("sha256:")


def _sha256(lines: list[str]) -> str:
    text = "".join(f"{line}\n" for line in lines)
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()
