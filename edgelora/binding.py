"""An adapter meets its base's tensors: merged into them, or bound to what it takes of them."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Adapter, Branch, PrefixFit, SoftPrompt
from edgelora.checkpoint import Checkpoint
from edgelora.config import ModelConfig
from edgelora.errors import EdgeLoraError
from edgelora.layout import expected_tensors, weight_name
from edgelora.merge import block_deltas, merge, row_factors, scaled
from edgelora.quantize import Int4Matrix, dequantize, move_offsets, quantize_nf4
from edgelora.soft_prompt import prefix_of

Float32 = NDArray[np.float32]


def merged(target: str, weight: Float32, branch: Branch) -> Float32:
    """The weight [out_features, in_features] with the branch in it. Raises EdgeLoraError."""
    if not branch.changes_weight:
        return weight
    with _naming(target):
        if branch.rank == 0:
            return scaled(weight, branch.output_factor, branch.input_factor)
        return merge(weight, branch.lora_a, branch.lora_b, branch.scaling, branch.magnitude)


def merged_codes(target: str, matrix: Int4Matrix, branch: Branch) -> Int4Matrix:
    """Codes with a branch in their offsets whose delta is the same for all inputs of a block
    (QA-LoRA). Raises EdgeLoraError.
    """
    with _naming(target):
        size = matrix.block_size
        delta = block_deltas(branch.lora_a, branch.lora_b, branch.scaling, size)
        return move_offsets(matrix, delta)


def as_nf4(target: str, weight: Float32) -> Float32:
    """The weight as a QLoRA adapter saw it in training: bitsandbytes leaves lm_head alone."""
    return weight if target == "lm_head" else dequantize(quantize_nf4(weight))


def merged_bias(target: str, bias: Float32, branch: Branch) -> Float32:
    """The bias, [out_features] or [0] for none, with the branch's in it. Raises EdgeLoraError."""
    if branch.trained_bias is not None:
        bias = branch.trained_bias.astype(np.float32)
    if branch.output_factor is not None:
        with _naming(target), np.errstate(over="ignore"):
            return _finite(bias * branch.output_factor) if bias.size else bias
    if branch.bias is None:
        return bias
    with _naming(target), np.errstate(over="ignore"):
        return _finite(bias + branch.bias if bias.size else branch.bias)


def check_biases(adapter: Adapter, path: Path, config: ModelConfig) -> None:
    """Raises EdgeLoraError if the base lacks a bias that the adapter replaces, or the adapter one
    that it trained.
    """
    ours = expected_tensors(config)
    names = [f"{each}.bias" for each, b in adapter.branches.items() if b.trained_bias is not None]
    if missing := [name for name in names if name not in ours]:
        raise EdgeLoraError(
            f"{path}: trained biases that the base does not have: {', '.join(missing)}: "
            "use the base it was trained on"
        )
    _refuse_missing_biases(adapter, path, [n[: -len(".bias")] for n in ours if n.endswith(".bias")])


def _refuse_missing_biases(adapter: Adapter, path: Path, biased: Collection[str]) -> None:
    """biased: the base's linears with a bias, all of which were trained, or those with factors."""
    branches, saved = adapter.branches, adapter.replaced.tensors
    ranks = {target: branch.rank for target, branch in branches.items()}
    trained = {target for target, branch in branches.items() if branch.trained_bias is not None}
    wanted = {"all": {*biased}, "lora_only": {each for each in biased if ranks.get(each)}}
    missing = wanted.get(adapter.bias, set()) - trained
    if names := [f"{each}.bias" for each in sorted(missing) if f"{each}.bias" not in saved]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise EdgeLoraError(
            f"{path}: bias = {adapter.bias}, but the file has no {names[0]}{more}: save the "
            "adapter again with PEFT 0.21.2"
        )


def prefix_fit(config: ModelConfig, context_length: int) -> PrefixFit:
    """What a prefix must fit."""
    sizes = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    return PrefixFit(*sizes, config.hidden_size, context_length)


def with_prefix(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """Soft embeddings as the keys and values that this base makes of them, which is read for them.

    Raises EdgeLoraError.
    """
    if not isinstance(adapter.prefix, SoftPrompt):
        return adapter
    return replace(adapter, prefix=prefix_of(adapter.prefix, checkpoint))


def bound(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """Its magnitudes (DoRA) and output factors ((IA)³) as factors of this base's rows, its trained
    biases as changes of this base's, its embeddings as keys and values: the base is read for them.

    Raises EdgeLoraError.
    """
    branches = {
        target: _with_row_factors(target, _with_bias(target, branch, checkpoint), checkpoint)
        for target, branch in adapter.branches.items()
    }
    return replace(with_prefix(adapter, checkpoint), branches=branches)


def bound_without_base(adapter: Adapter, path: Path, biased: Collection[str]) -> Adapter:
    """Its output factors as factors of rows; biased: the base's linears with a bias.

    Raises EdgeLoraError where a bias would be changed.
    """
    _refuse_missing_biases(adapter, path, biased)
    found = {t for t, branch in adapter.branches.items() if branch.output_factor is not None}
    if changed := sorted(found.intersection(biased)):
        raise EdgeLoraError(
            f"{path}: (IA)³ multiplies {len(changed)} biases of the base, {changed[0]}.bias first: "
            "that takes the base: add it with --base"
        )
    branches = {target: _scaled_rows(branch) for target, branch in adapter.branches.items()}
    return replace(adapter, branches=branches)


def _scaled_rows(branch: Branch) -> Branch:
    if branch.output_factor is None:
        return branch
    return replace(branch, output_factor=None, row_factor=branch.output_factor)


def _with_bias(target: str, branch: Branch, checkpoint: Checkpoint) -> Branch:
    name, factor = f"{target}.bias", branch.output_factor
    if branch.trained_bias is None and (factor is None or name not in checkpoint.names()):
        return branch
    base = checkpoint.read(name)
    with _naming(target), np.errstate(over="ignore"):
        change = _finite(merged_bias(target, base, branch) - base)
    return replace(branch, bias=change, trained_bias=None)


def _finite(bias: Float32) -> Float32:
    if not np.isfinite(bias).all():
        raise ValueError("the bias is not finite")
    return bias


def _with_row_factors(target: str, branch: Branch, checkpoint: Checkpoint) -> Branch:
    if branch.magnitude is None:
        return _scaled_rows(branch)
    weight = checkpoint.read(weight_name(checkpoint.config, target))
    with _naming(target):
        factors = row_factors(
            weight, branch.lora_a, branch.lora_b, branch.scaling, branch.magnitude
        )
    lora_b = factors[:, None] * branch.lora_b.astype(np.float32)
    return replace(branch, lora_b=lora_b, magnitude=None, row_factor=factors)


@contextmanager
def _naming(target: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise EdgeLoraError(f"{target}: {error}; train the adapter again") from error
