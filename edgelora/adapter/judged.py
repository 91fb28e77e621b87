"""What a family's reader makes of a PEFT folder."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from edgelora.adapter.branches import Branch
from edgelora.adapter.ledger import LedgerEntry
from edgelora.adapter.prefix import Prefix, SoftPrompt
from edgelora.adapter.replaced import Replaced
from edgelora.adapter.tensors import StoredTensor

Targets = Mapping[str, tuple[int, int]]  # module path → (out_features, in_features)


class Judged(NamedTuple):
    """All branches that can be read, what is replaced, the ledger of every field and tensor, what
    stands before the text, and copies of base weights by the file's names.
    """

    branches: Mapping[str, Branch]  # by target, sorted
    replaced: Replaced
    ledger: list[LedgerEntry]
    prefix: Prefix | SoftPrompt | None = None
    copies: Mapping[str, StoredTensor] = MappingProxyType({})
