"""A base as an adapter leaves its modules, rows and embedding: another checkpoint, read as any."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Adapter, Replaced, Rows, is_saved, tokens_of
from edgelora.binding import merged
from edgelora.checkpoint import Checkpoint, StoredAs
from edgelora.config import ModelConfig
from edgelora.errors import EdgeLoraError
from edgelora.layout import EMBEDDING, expected_tensors
from edgelora.quantize.matrix import CodedMatrix

ROWS_IN, ROWS_OUT = f"{EMBEDDING}.weight", "lm_head.weight"
SHOWN = 8  # of the problems in an error's line


class ChangedBase:
    """The source with tensors and rows replaced; lm_head stays tied where PEFT keeps it so."""

    def __init__(self, source: Checkpoint, replaced: Replaced) -> None:
        self.source = source
        self.path, self.name = source.path, source.name
        self._replaced = replaced
        tied = source.config.tie_word_embeddings and not _unties(replaced)
        rows = grown_rows(replaced, source.config)
        self.config = replace(source.config, tie_word_embeddings=tied, vocab_size=rows)

    def names(self) -> Sequence[str]:
        return sorted(expected_tensors(self.config))

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._replaced.tensors:
            return self._replaced.tensors[name].shape
        return self.source.shape(self._source_name(name))

    def read(self, name: str) -> NDArray[np.float32]:
        """An embedding with factors is merged anew each time, for nothing of a tensor is kept."""
        if name in self._replaced.tensors:
            return np.asarray(self._replaced.tensors[name].values(), np.float32)
        values = self.source.read(self._source_name(name))
        if name == ROWS_IN and self._replaced.embedding is not None:
            return merged(EMBEDDING, values, self._replaced.embedding)
        if (rows := self._replaced.rows.get(name)) is None:
            return values
        changed = values.copy()
        changed[list(rows.tokens)] = rows.values
        return changed

    def stored_as(self, name: str) -> StoredAs | None:
        return self.source.stored_as(self._source_name(name)) if self._is_kept(name) else None

    def read_quantized(self, name: str) -> CodedMatrix | None:
        return self.source.read_quantized(self._source_name(name)) if self._is_kept(name) else None

    def _is_kept(self, name: str) -> bool:
        replaced = self._replaced
        changed = {*replaced.tensors, *replaced.rows}
        return name not in changed and not (name == ROWS_IN and replaced.embedding)

    def _source_name(self, name: str) -> str:
        """Of an lm_head that is no longer tied, the embedding's."""
        return name if name in self.source.names() else ROWS_IN


def changed_base(checkpoint: Checkpoint, adapter: Adapter, path: Path) -> Checkpoint:
    """The checkpoint that the adapter's branches are to be merged into.

    Raises EdgeLoraError: one line with what does not fit the base.
    """
    replaced = adapter.replaced
    problems = [
        *_misfits(replaced, checkpoint.config),
        *_missing(replaced, checkpoint.config),
        *_token_problems(adapter, checkpoint.config),
    ]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise EdgeLoraError(f"{path}: {'; '.join(problems[:SHOWN])}{more}")
    return ChangedBase(checkpoint, replaced) if replaced else checkpoint


def source_of(checkpoint: Checkpoint) -> Checkpoint:
    """The base as it was."""
    return checkpoint.source if isinstance(checkpoint, ChangedBase) else checkpoint


def _unties(replaced: Replaced) -> bool:
    """Of a tied base, PEFT gives a saved module weights of its own; an embedding's rows it gives to
    lm_head too, unless that has others. Its factors act on the embedding alone (in PEFT's forward:
    its merge in place would change lm_head too).
    """
    if replaced.embedding is not None:
        return True
    own = {ROWS_IN, ROWS_OUT} & (replaced.tensors.keys() | {*replaced.rows} - {ROWS_IN})
    return bool(own)


def _tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """All that may be replaced, a tied lm_head too."""
    return expected_tensors(config) | {ROWS_OUT: (config.vocab_size, config.hidden_size)}


def grown_rows(replaced: Replaced, config: ModelConfig) -> int:
    """vocab_size, or that of a greater embedding that was saved whole."""
    tensor = replaced.tensors.get(ROWS_IN)
    return max(config.vocab_size, tensor.shape[0] if tensor and tensor.shape else 0)


def _misfits(replaced: Replaced, config: ModelConfig) -> list[str]:
    count = grown_rows(replaced, config)
    grown = count > config.vocab_size
    ours, problems = _tensors(replace(config, vocab_size=count)), []
    if grown and ROWS_OUT not in replaced.tensors:
        problems.append(
            f"{ROWS_IN}: saved as {list(replaced.tensors[ROWS_IN].shape)}, the base has "
            f"{config.vocab_size} rows: of a grown vocabulary modules_to_save must have lm_head too"
        )
    for name, tensor in replaced.tensors.items():
        if name not in ours:
            problems.append(f"{name}: saved whole, but the base has no such tensor")
        elif tensor.shape != ours[name]:
            problems.append(f"{name}: saved as {list(tensor.shape)}, the base has {[*ours[name]]}")
    for name, rows in replaced.rows.items():
        problems += [f"{name}: {each}" for each in _row_problems(rows, ours[name])]
    return problems


def _row_problems(rows: Rows, shape: tuple[int, ...]) -> list[str]:
    beyond = [token for token in rows.tokens if token >= shape[0]]
    problems = [f"token {beyond[0]} is not below vocab_size {shape[0]}"] if beyond else []
    if rows.values.shape[1] != shape[1]:
        problems.append(f"rows of {rows.values.shape[1]} values, the base has {shape[1]}")
    return problems


def _missing(replaced: Replaced, config: ModelConfig) -> list[str]:
    wanted = [name for name in _tensors(config) if is_saved(name, replaced.modules_to_save)]
    return [
        f"{name}: of modules_to_save, but not in the file"
        for name in wanted
        if name not in replaced.tensors
    ]


def _token_problems(adapter: Adapter, config: ModelConfig) -> list[str]:
    replaced = adapter.replaced
    if not replaced.tokens:
        return []
    inner, outer = (tokens_of(module, replaced.tokens) for module in (EMBEDDING, "lm_head"))
    shared = config.tie_word_embeddings and bool(inner) and outer in ((), inner)
    expected = {ROWS_IN} if shared else set()
    expected |= {name for name, ids in ((ROWS_IN, inner), (ROWS_OUT, outer)) if ids and not shared}
    wrong = sorted(expected ^ replaced.rows.keys())
    problems = [f"{name}: trained tokens are missing or not expected" for name in wrong]
    whole = {ROWS_IN, ROWS_OUT} & replaced.tensors.keys()
    if whole or replaced.embedding or ("lm_head" in adapter.branches and (shared or outer)):
        problems.append(
            "trainable_token_indices beside another change of the embedding or lm_head is not "
            "supported"
        )
    return problems
