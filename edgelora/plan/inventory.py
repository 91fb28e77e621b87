"""What a plan needs to know of a base and its adapters; nothing of a weight is read for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Inventory:
    """Matrices go by their module path ("model.layers.0.mlp.up_proj")."""

    stored: Mapping[str, str] = field(default_factory=dict)
    """Matrices that the base has in codes of ours → "int4" (blocks of 32), "int8", "nf4", "fp4"."""
    offsets: frozenset[str] = frozenset()  # those in int4 that have offsets: GGUF's Q4_1
    plain: frozenset[str] = frozenset()  # those in nf4 and fp4 whose absmax is float32
    foreign: Mapping[str, int] = field(default_factory=dict)
    """Why 4-bit matrices of a bitsandbytes folder are none of `stored` → how many."""
    adapters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Adapter → target → rank (0 for (IA)³), of those whose weights it changes."""
    magnitudes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Adapter → targets that have a factor for each row (DoRA, (IA)³)."""
    groups: Mapping[str, int] = field(default_factory=dict)
    """Target → inputs that share a value of A, where it is QA-LoRA's."""
    biases: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Adapter → targets that get a bias."""

    prefixes: Mapping[str, int] = field(default_factory=dict)
    """Adapter → positions that it puts before the text, of those that do."""

    @property
    def changed(self) -> frozenset[str]:
        """Targets that some adapter changes."""
        return frozenset(target for ranks in self.adapters.values() for target in ranks)
