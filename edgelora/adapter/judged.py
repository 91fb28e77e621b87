"""What a family's reader makes of a PEFT folder."""

from collections.abc import Mapping
from typing import NamedTuple

from edgelora.adapter.branches import Branch
from edgelora.adapter.ledger import LedgerEntry
from edgelora.adapter.prefix import Prefix, SoftPrompt
from edgelora.adapter.replaced import Replaced

Targets = Mapping[str, tuple[int, int]]  # module path → (out_features, in_features)


class Judged(NamedTuple):
    """All branches that can be read, what is replaced, the ledger of every field and tensor, and
    what stands before the text.
    """

    branches: Mapping[str, Branch]  # by target, sorted
    replaced: Replaced
    ledger: list[LedgerEntry]
    prefix: Prefix | SoftPrompt | None = None
