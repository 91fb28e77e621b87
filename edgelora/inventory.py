"""Base and adapters → what the plan needs to know of them, from their headers alone."""

from collections import Counter
from collections.abc import Collection, Mapping

from edgelora.adapter import Adapter, Branch
from edgelora.changed_base import source_of
from edgelora.checkpoint import Checkpoint
from edgelora.checkpoint.bitsandbytes import BitsAndBytesCheckpoint
from edgelora.checkpoint.gguf import GgufCheckpoint
from edgelora.checkpoint.gguf_config import huggingface_name
from edgelora.checkpoint.gguf_file import read_gguf
from edgelora.plan import Inventory
from edgelora.repeated_base import RepeatedBase

_SUFFIX = ".weight"


def take_inventory(checkpoint: Checkpoint, adapters: Mapping[str, Adapter]) -> Inventory:
    """Reads no weight."""
    stored = {name: checkpoint.stored_as(name) for name in checkpoint.names()}
    foreign: Counter[str] = Counter()
    plain: frozenset[str] = frozenset()
    source, origins = _origins(checkpoint)
    if isinstance(source, BitsAndBytesCheckpoint):
        foreign = Counter(why for origin in origins.values() if (why := source.obstacle(origin)))
        plain = frozenset(n.removesuffix(_SUFFIX) for n, o in origins.items() if source.is_plain(o))
    return Inventory(
        stored={name.removesuffix(_SUFFIX): kind for name, kind in stored.items() if kind},
        offsets=_with_offsets(source, origins),
        plain=plain,
        foreign=dict(foreign),
        adapters={
            name: {t: b.rank for t, b in adapter.branches.items() if b.changes_weight}
            for name, adapter in adapters.items()
        },
        magnitudes={
            name: frozenset(t for t, b in adapter.branches.items() if _has_row_factors(b))
            for name, adapter in adapters.items()
        },
        groups={
            t: b.group for a in adapters.values() for t, b in a.branches.items() if b.group > 1
        },
        biases={
            name: frozenset(t for t, b in adapter.branches.items() if _has_bias(t, b, stored))
            for name, adapter in adapters.items()
        },
        prefixes={name: a.prefix.positions for name, a in adapters.items() if a.prefix},
    )


def _has_row_factors(branch: Branch) -> bool:
    return branch.magnitude is not None or branch.output_factor is not None


def _has_bias(target: str, branch: Branch, names: Collection[str]) -> bool:
    """Output factors change the base's bias; names: the base's tensors."""
    changes = branch.output_factor is not None and f"{target}.bias" in names
    return changes or branch.bias is not None or branch.trained_bias is not None


def _origins(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, str]]:
    """The base as the files have it; the tensors' names → theirs."""
    source = source_of(checkpoint)
    if not isinstance(source, RepeatedBase):
        return source, {name: name for name in source.names()}
    return source.source, {name: source.origin(name) for name in source.names()}


def _with_offsets(checkpoint: Checkpoint, origins: Mapping[str, str]) -> frozenset[str]:
    if not isinstance(checkpoint, GgufCheckpoint):
        return frozenset()
    names = {
        huggingface_name(name)
        for name, tensor in read_gguf(checkpoint.path).tensors.items()
        if tensor.type.name == "Q4_1"
    }
    return frozenset(n.removesuffix(_SUFFIX) for n, origin in origins.items() if origin in names)
