"""What an adapter puts before the text: keys and values of the kv_cache, or soft embeddings of
tokens, which the base turns into such.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import EdgeLoraError

Array = NDArray[np.float32 | np.float16]


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys as attention multiplies them: nothing is done to them any more, no norm, no rotation."""

    keys: Array  # [layers, kv_heads, positions, head_dim]
    values: Array  # likewise

    @property
    def positions(self) -> int:
        """How many the text stands behind."""
        return int(self.keys.shape[2])

    def layer(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of a layer, [kv_heads, positions, head_dim]."""
        return self.keys[index].astype(np.float32), self.values[index].astype(np.float32)


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """Embeddings of tokens that no vocabulary has."""

    embeddings: Array  # [positions, hidden_size]

    @property
    def positions(self) -> int:
        """How many the text stands behind."""
        return len(self.embeddings)


def as_float32(prefix: Prefix) -> Prefix:
    """The same values."""
    return Prefix(prefix.keys.astype(np.float32), prefix.values.astype(np.float32))


def as_half(prefix: Prefix, source: str) -> Prefix:
    """Rounded to float16. Raises EdgeLoraError for values that it cannot hold."""
    with np.errstate(over="ignore"):
        half = Prefix(prefix.keys.astype(np.float16), prefix.values.astype(np.float16))
    if not np.isfinite(half.keys).all() or not np.isfinite(half.values).all():
        raise EdgeLoraError(
            f"{source}: a key or a value of its prefix does not fit float16: export --format float"
        )
    return half


@dataclass(frozen=True)
class PrefixFit:
    """The base, as far as a prefix has to do with it."""

    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    context_length: int

    def check(self, prefix: Prefix | SoftPrompt, path: Path) -> None:
        """Raises EdgeLoraError for a prefix of another base, or one that fills the context."""
        found, expected = list(_shape(prefix)), list(self._expected(prefix))
        if found != expected:
            raise EdgeLoraError(
                f"{path}: prompt_embeddings are for {found}, the base has {expected} "
                f"({_AXES[type(prefix)]}): use the base it was trained on"
            )
        if prefix.positions >= self.context_length:
            raise EdgeLoraError(
                f"{path}: its {prefix.positions} virtual tokens leave nothing of the context of "
                f"{self.context_length}: export with a longer --context-length"
            )

    def _expected(self, prefix: Prefix | SoftPrompt) -> tuple[int, ...]:
        if isinstance(prefix, SoftPrompt):
            return (self.hidden_size,)
        return self.layers, self.kv_heads, self.head_dim


_AXES = {Prefix: "layers, heads of keys and values, head_dim", SoftPrompt: "hidden_size"}


def _shape(prefix: Prefix | SoftPrompt) -> tuple[int, ...]:
    if isinstance(prefix, SoftPrompt):
        return prefix.embeddings.shape[1:]
    layers, heads, _, head_dim = prefix.keys.shape
    return layers, heads, head_dim
