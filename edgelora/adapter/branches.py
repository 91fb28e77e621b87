"""Tensors of adapter_model.safetensors → one `Branch` a target, checked against config and base."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    """What an adapter makes of one target: W = W0 + scaling · lora_b · lora_a.

    With a magnitude (DoRA, Liu et al. 2024) each row of W is then brought to that length. Bound
    to a base that is row_factor ⊙ W0 + scaling · lora_b · lora_a, its lora_b scaled already.
    """

    lora_a: Factor  # [rank, in_features]
    lora_b: Factor  # [out_features, rank]
    scaling: float
    magnitude: Factor | None = None  # [out_features]
    row_factor: NDArray[np.float32] | None = None  # [out_features]

    @property
    def rank(self) -> int:
        return len(self.lora_a)


# `lora_A.weight` as PEFT saves it, `lora_A.default.weight` as it is named inside a model
FACTOR_NAME = re.compile(
    r"base_model\.model\.(?P<target>.+)\.lora_"
    r"(?:(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|magnitude_vector(?:\.(?P<magnitude_adapter>[^.]+)\.weight)?)"
)

# The first expression found in a name says why it is refused.
OTHER_TENSORS = [
    (r"\.lora_embedding_[AB]\b", "an adapter of the token embedding is not supported"),
    (r"\.lora_magnitude_vector\b", "a magnitude vector by no name that PEFT gives it"),
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

MAGNITUDE = "magnitude_vector"
Pairs = dict[str, dict[str, str]]  # target → "A", "B", MAGNITUDE → tensor name


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
        elif (factor := found["factor"] or MAGNITUDE) in pairs.setdefault(found["target"], {}):
            reason = f"a second lora_{factor} for the target {found['target']}"
            ledger.append(refused(name, reason))
        else:
            pairs[found["target"]][factor] = name
    return pairs, ledger + _adapter_names(tensors)


def _adapter_names(tensors: Mapping[str, StoredTensor]) -> list[LedgerEntry]:
    found = (FACTOR_NAME.fullmatch(name) for name in sorted(tensors))
    names = sorted(
        {match["adapter"] or match["magnitude_adapter"] or "(none)" for match in found if match}
    )
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
    wanted = ("A", "B", MAGNITUDE) if settings.use_dora else ("A", "B")
    complete = {target for target, pair in pairs.items() if pair.keys() >= set(wanted)}
    agreed = sorted(complete & implied & known)
    ledger = _foreign_modules(pairs.keys() | implied, pairs, known)
    ledger += [refused(each, NOT_IN_FILE) for each in sorted(implied & known - pairs.keys())]
    ledger += [refused(each, NOT_IN_CONFIG) for each in sorted(pairs.keys() & known - implied)]
    for target, pair in sorted(pairs.items()):
        ledger += [refused(target, f"has no lora_{each}") for each in wanted if each not in pair]
        if MAGNITUDE in pair and not settings.use_dora:
            ledger.append(refused(pair[MAGNITUDE], "belongs to DoRA, but use_dora is not set"))
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
    shapes = {"A": (rank, size[1]), "B": (size[0], rank), MAGNITUDE: (size[0],)}
    names = {factor: pair[factor] for factor in shapes if factor in pair}
    bad = [_check_factor(name, tensors[name], shapes[factor]) for factor, name in names.items()]
    if any(bad):
        return None, [entry for entries in bad for entry in entries]
    values = {factor: tensors[name].values() for factor, name in names.items()}
    branch = Branch(values["A"], values["B"], scaling, values.get(MAGNITUDE))
    reason = f"rank {rank}, scaling {scaling:g}"
    if branch.magnitude is not None:
        reason += ", then rows of the magnitude's length (DoRA)"
    elif not branch.lora_a.any() or not branch.lora_b.any():
        reason += "; all zero, so it changes nothing"
    return branch, [exported(name, reason) for name in names.values()]


def _check_factor(name: str, tensor: StoredTensor, expected: tuple[int, ...]) -> list[LedgerEntry]:
    if not tensor.is_float:
        return [refused(name, f"dtype {tensor.dtype}; must be float32, float16 or bfloat16")]
    if tensor.shape != expected:
        return [
            refused(name, f"shape {list(tensor.shape)}, but config and base need {list(expected)}")
        ]
    if not np.isfinite(tensor.values()).all():
        return [refused(name, "holds NaN or infinity")]
    return []
