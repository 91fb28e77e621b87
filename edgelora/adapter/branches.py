"""Tensors of adapter_model.safetensors → one `Branch` a target, checked against config and base."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from edgelora.adapter.ledger import LedgerEntry, exported, refused
from edgelora.adapter.settings import Settings
from edgelora.adapter.targets import (
    implied_targets,
    rank_and_scaling,
    unmatched_names,
    unmatched_patterns,
)
from edgelora.adapter.tensors import Factor, StoredTensor


@dataclass(frozen=True, eq=False)
class Branch:
    """The side branch of one target: y += scaling · lora_b · (lora_a · x)."""

    lora_a: Factor  # [rank, in_features]
    lora_b: Factor  # [out_features, rank]
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.lora_a)


# `lora_A.weight` as PEFT saves it, `lora_A.default.weight` as it is named inside a model
FACTOR_NAME = re.compile(
    r"base_model\.model\.(?P<target>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)

# The first expression found in a name says why it is refused.
OTHER_TENSORS = [
    (r"\.lora_embedding_[AB]\b", "an adapter of the token embedding is not supported"),
    (r"\.lora_magnitude_vector\b", "a DoRA magnitude vector; DoRA is not supported"),
    (r"\.lora_B(\.[^.]+)?\.bias$", "a bias in lora_B (lora_bias) is not supported"),
    (r"\.lora_diag\b", "a KaSA diagonal; KaSA is not supported"),
    (r"trainable_tokens|token_adapter", "trained tokens are not supported"),
    (r"modules_to_save", "a whole trained module (modules_to_save) is not supported"),
    (
        r"\.base_layer\.|(embed_tokens|lm_head)\.weight$",
        "a copy of base weights; save with save_embedding_layers=False",
    ),
    (r"\.bias$", "a trained bias is not supported"),
    (r"", "not a LoRA factor of PEFT (base_model.model.<module>.lora_A.weight or lora_B.weight)"),
]

EMBEDDINGS = (
    "lm_head",
    "model.embed_tokens",
)  # a config may name them; the caller decides on lm_head
NOT_IN_FILE = "named by target_modules, but the file has no lora_A and lora_B for it"
NOT_IN_CONFIG = "in the file, but the config's target_modules do not name it"

Pairs = dict[str, dict[str, str]]  # target → "A", "B" → tensor name


def pair_factors(tensors: Mapping[str, StoredTensor]) -> tuple[Pairs, list[LedgerEntry]]:
    """Tensor names by target and factor; a refusal for every tensor that is none or comes twice."""
    pairs: Pairs = {}
    ledger = []
    for name in sorted(tensors):
        found = FACTOR_NAME.fullmatch(name)
        if found is None:
            reason = next(
                reason for expression, reason in OTHER_TENSORS if re.search(expression, name)
            )
            ledger.append(refused(name, reason))
        elif found["factor"] in pairs.setdefault(found["target"], {}):
            ledger.append(
                refused(name, f"a second lora_{found['factor']} for the target {found['target']}")
            )
        else:
            pairs[found["target"]][found["factor"]] = name
    return pairs, ledger + _adapter_names(tensors)


def _adapter_names(tensors: Mapping[str, StoredTensor]) -> list[LedgerEntry]:
    found = (FACTOR_NAME.fullmatch(name) for name in sorted(tensors))
    names = sorted({match["adapter"] or "(none)" for match in found if match})
    return (
        [refused(", ".join(names), "adapter names; a file must hold one adapter")]
        if len(names) > 1
        else []
    )


def check_targets(
    pairs: Pairs, settings: Settings, targets: Iterable[str]
) -> tuple[list[str], list[LedgerEntry]]:
    """The targets that config, file and base agree on, and refusals for all others."""
    known = set(targets)
    implied = set(implied_targets(settings, sorted(known | set(EMBEDDINGS))))
    complete = {target for target, pair in pairs.items() if len(pair) == 2}
    agreed = sorted(complete & implied & known)
    ledger = _foreign_modules(pairs.keys() | implied, pairs, known)
    ledger += [refused(each, NOT_IN_FILE) for each in sorted(implied & known - pairs.keys())]
    ledger += [refused(each, NOT_IN_CONFIG) for each in sorted(pairs.keys() & known - implied)]
    for target in sorted(pairs.keys() - complete):
        ledger += [
            refused(target, f"has no lora_{each}") for each in "AB" if each not in pairs[target]
        ]
    if not pairs:
        ledger.append(refused("adapter_model.safetensors", "holds no lora_A and lora_B"))
    ledger += unmatched_patterns(settings, implied)
    return agreed, ledger + unmatched_names(settings, known | set(EMBEDDINGS))


def _foreign_modules(named: set[str], pairs: Pairs, known: set[str]) -> list[LedgerEntry]:
    matching = len(pairs.keys() & known)
    hint = f"{matching} of the adapter's {len(pairs)} modules match"
    if not matching:
        hint = "none of the adapter's modules match; made for another architecture?"
    reason = f"the base has no linear of this name that takes an adapter ({hint})"
    return [refused(each, reason) for each in sorted(named - known)]


def read_branch(
    tensors: Mapping[str, StoredTensor],
    pair: Mapping[str, str],
    settings: Settings,
    target: str,
    size: tuple[int, int],
) -> tuple[Branch | None, list[LedgerEntry]]:
    """One target's branch (None if a tensor is bad) and its tensors' ledger; size: (out, in)."""
    rank, scaling = rank_and_scaling(settings, target)
    a, b = tensors[pair["A"]], tensors[pair["B"]]
    ledger = _check_factor(pair["A"], a, (rank, size[1])) + _check_factor(
        pair["B"], b, (size[0], rank)
    )
    if ledger:
        return None, ledger
    reason = f"rank {rank}, scaling {scaling:g}"
    branch = Branch(a.values(), b.values(), scaling)
    if not branch.lora_a.any() or not branch.lora_b.any():
        reason += "; all zero, so it changes nothing"
    return branch, [exported(pair["A"], reason), exported(pair["B"], reason)]


def _check_factor(name: str, tensor: StoredTensor, expected: tuple[int, int]) -> list[LedgerEntry]:
    if not tensor.is_float:
        return [refused(name, f"dtype {tensor.dtype}; must be float32, float16 or bfloat16")]
    if tensor.shape != expected:
        return [
            refused(name, f"shape {list(tensor.shape)}, but config and base need {list(expected)}")
        ]
    if not np.isfinite(tensor.values()).all():
        return [refused(name, "holds NaN or infinity")]
    return []
