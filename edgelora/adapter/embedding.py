"""An adapter's factors of the token embedding, which only merging can apply.

PEFT 0.21.2 (`Embedding` in peft/tuners/lora/layer.py): token t's row plus scaling·B·A[:, t].
"""

import re
from collections.abc import Iterable, Mapping

from edgelora.adapter.branches import EMBEDDING, NOT_IN_CONFIG, Branch, check_tensor
from edgelora.adapter.ledger import LedgerEntry, exported, refused
from edgelora.adapter.settings import Settings
from edgelora.adapter.targets import implied_targets, rank_and_scaling
from edgelora.adapter.tensors import StoredTensor

NAME = re.compile(r"base_model\.model\.model\.embed_tokens\.lora_embedding_(?P<factor>[AB])")
NOT_WITH = "the token embedding's factors are supported without it only: train it without"


def embedding_factors(tensors: Iterable[str]) -> dict[str, str]:
    """ "A", "B" → tensor name."""
    found = (NAME.fullmatch(name) for name in sorted(tensors))
    return {match["factor"]: match[0] for match in found if match}


def read_embedding(
    tensors: Mapping[str, StoredTensor], settings: Settings, size: tuple[int, int] | None
) -> tuple[Branch | None, list[LedgerEntry]]:
    """The branch of the embedding [vocab_size, hidden_size], if there is one, and the ledger.

    size: the embedding's, if known.
    """
    names = embedding_factors(tensors)
    is_named = EMBEDDING in implied_targets(settings, [EMBEDDING])
    if not names and not is_named:
        return None, []
    rank, scaling = rank_and_scaling(settings, EMBEDDING)
    rows, columns = size or _own_size(tensors, names)
    shapes = {"A": (rank, rows), "B": (columns, rank)}
    ledger = _mismatches(names, settings, is_named=is_named)
    for factor, name in names.items():
        ledger += check_tensor(name, tensors[name], shapes[factor])
    if ledger:
        return None, ledger
    lora_a, lora_b = (tensors[names[each]].values().T.copy() for each in "BA")
    reason = f"rank {rank}, scaling {scaling:g}, added to the embedding: --mode merge"
    return Branch(lora_a, lora_b, scaling), [exported(name, reason) for name in names.values()]


def _own_size(tensors: Mapping[str, StoredTensor], names: Mapping[str, str]) -> tuple[int, int]:
    """What the file says of it."""
    shapes = {factor: tensors[name].shape for factor, name in names.items()}
    return (shapes.get("A") or (0,))[-1], (shapes.get("B") or (0,))[0]


def _mismatches(
    names: Mapping[str, str], settings: Settings, *, is_named: bool
) -> list[LedgerEntry]:
    if not is_named:
        return [refused(name, NOT_IN_CONFIG) for name in names.values()]
    ledger = [
        refused(EMBEDDING, f"has no lora_embedding_{each}") for each in "AB" if each not in names
    ]
    switches = ("use_dora", "lora_bias", "ensure_weight_tying")
    return ledger + [refused(name, NOT_WITH) for name in switches if getattr(settings, name)]
