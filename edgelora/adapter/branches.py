"""Tensors of adapter_model.safetensors → one `Branch` a target, checked against the config and the base."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgelora.adapter.ledger import LedgerEntry, exported, refused
from edgelora.adapter.settings import Settings
from edgelora.adapter.targets import implied_targets, rank_and_scaling, unmatched_patterns
from edgelora.adapter.tensors import Factor, StoredTensor


@dataclass(frozen=True, eq=False)
class Branch:
    """The side branch of one target: y += scaling · lora_b · (lora_a · x)."""

    lora_a: Factor  # [rank, in_features]
    lora_b: Factor  # [out_features, rank]
    scaling: float

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]


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

Pairs = dict[str, dict[str, str]]  # target → "A", "B" → tensor name


def pair_factors(tensors: Mapping[str, StoredTensor]) -> tuple[Pairs, list[LedgerEntry]]:
    """Tensor names by target and factor, and a refusal for every tensor that is none or comes twice."""
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
    pairs: Pairs, settings: Settings, targets: Mapping[str, object]
) -> list[LedgerEntry]:
    """Refusals where the config, the file and the base do not name the same modules."""
    implied = implied_targets(settings, sorted(targets.keys() | {"lm_head", "model.embed_tokens"}))
    ledger = _foreign_modules(pairs, implied, targets)
    for target in sorted(set(implied) & targets.keys() - pairs.keys()):
        ledger.append(
            refused(target, "named by target_modules, but the file has no lora_A and lora_B for it")
        )
    for target in sorted(pairs.keys() & targets.keys() - set(implied)):
        ledger.append(
            refused(target, "in the file, but the config's target_modules do not name it")
        )
    for target in sorted(pairs):
        ledger += [
            refused(target, f"has no lora_{each}") for each in "AB" if each not in pairs[target]
        ]
    if not pairs:
        ledger.append(refused("adapter_model.safetensors", "holds no lora_A and lora_B"))
    return ledger + unmatched_patterns(settings, implied)


def _foreign_modules(
    pairs: Pairs, implied: list[str], targets: Mapping[str, object]
) -> list[LedgerEntry]:
    foreign = sorted((pairs.keys() | set(implied)) - targets.keys())
    matching = len(pairs.keys() & targets.keys())
    hint = f"{matching} of the adapter's {len(pairs)} modules match"
    hint = (
        "none of the adapter's modules match; made for another architecture?"
        if not matching
        else hint
    )
    return [
        refused(each, f"no linear of the base that takes an adapter ({hint})") for each in foreign
    ]


def read_branch(
    tensors: Mapping[str, StoredTensor],
    pair: Mapping[str, str],
    settings: Settings,
    target: str,
    size: tuple[int, int],
) -> tuple[Branch | None, list[LedgerEntry]]:
    """One target's branch (None if a tensor is bad) and the ledger of its two tensors. size: (out, in)."""
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
