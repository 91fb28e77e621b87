"""Tensors of adapter_model.safetensors → one `Branch` a target, checked against config and base."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter.fields import MERGE
from edgelora.adapter.ledger import LedgerEntry, exported, refused
from edgelora.adapter.qalora import expanded, inputs_of_a_mean
from edgelora.adapter.settings import Settings
from edgelora.adapter.targets import (
    implied_targets,
    overlapping_alphas,
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
    Outputs may get a bias. (IA)³ has no delta but factors: W = output_factor ⊙ W0 ⊙ input_factor,
    and output_factor times the base's bias. What has no delta is of rank 0.
    """

    lora_a: Factor  # [rank, in_features]
    lora_b: Factor  # [out_features, rank]
    scaling: float
    magnitude: Factor | None = None  # [out_features]
    row_factor: NDArray[np.float32] | None = None  # [out_features]
    bias: NDArray[np.float32] | None = None  # [out_features], added to the base's, if it has one
    trained_bias: Factor | None = None  # [out_features], takes the place of the base's
    output_factor: NDArray[np.float32] | None = None  # [out_features]
    input_factor: NDArray[np.float32] | None = None  # [in_features]
    group: int = 1  # consecutive inputs to which lora_a gives one value (QA-LoRA)

    @classmethod
    def of_rank_0(cls, size: tuple[int, int], **parts: Any) -> "Branch":
        """size: (out_features, in_features)."""
        rows, columns = size
        none = np.zeros((0, columns), np.float32), np.zeros((rows, 0), np.float32)
        return cls(*none, 1.0, **parts)

    @property
    def rank(self) -> int:
        return len(self.lora_a)

    @property
    def changes_weight(self) -> bool:
        """Not only outputs' biases."""
        factors = (self.row_factor, self.output_factor, self.input_factor)
        return self.rank > 0 or any(each is not None for each in factors)


# `lora_A.weight` as PEFT saves it, `lora_A.default.weight` as it is named inside a model
FACTOR_NAME = re.compile(
    r"base_model\.model\.(?P<target>.+)\.lora_"
    r"(?:(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|(?P<bias>B)(?:\.(?P<bias_adapter>[^.]+))?\.bias"
    r"|magnitude_vector(?:\.(?P<magnitude_adapter>[^.]+)\.weight)?)"
)

# The first expression found in a name says why it is refused.
OTHER_TENSORS = [
    (
        r"\.lora_embedding_[AB]\b",
        "not a factor of the token embedding as PEFT names it "
        "(base_model.model.model.embed_tokens.lora_embedding_A)",
    ),
    (r"\.lora_magnitude_vector\b", "a magnitude vector by no name that PEFT gives it"),
    (r"\.lora_diag\b", f"a KaSA diagonal: {MERGE}"),
    (r"modules_to_save", "a saved module by no name that PEFT gives it"),
    (
        r"\.base_layer\.|(embed_tokens|lm_head)\.weight$",
        "a copy of base weights; save with save_embedding_layers=False",
    ),
    (r"\.bias$", "a bias by no name that PEFT gives it"),
    (r"", "not a LoRA factor of PEFT (base_model.model.<module>.lora_A.weight or lora_B.weight)"),
]

EMBEDDING = "model.embed_tokens"
EMBEDDINGS = ("lm_head", EMBEDDING)  # a config may name them; the caller decides on lm_head
NOT_IN_FILE = "named by target_modules, but the file has no lora_A and lora_B for it"
NOT_IN_CONFIG = "in the file, but the config's target_modules do not name it"

SWITCHED_OFF = {
    "magnitude_vector": "belongs to DoRA, but use_dora is not set",
    "B.bias": "a bias in lora_B, but lora_bias is not set",
}
MAGNITUDE = "magnitude_vector"
BIAS = "B.bias"
Pairs = dict[str, dict[str, str]]  # target → "A", "B", MAGNITUDE, BIAS → tensor name


def pair_factors(tensors: Iterable[str]) -> tuple[Pairs, list[LedgerEntry]]:
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
        elif (factor := _factor(found)) in pairs.setdefault(found["target"], {}):
            reason = f"a second lora_{factor} for the target {found['target']}"
            ledger.append(refused(name, reason))
        else:
            pairs[found["target"]][factor] = name
    return pairs, ledger + _adapter_names(tensors)


def _factor(found: re.Match[str]) -> str:
    return found["factor"] or (BIAS if found["bias"] else MAGNITUDE)


def _adapter_names(tensors: Iterable[str]) -> list[LedgerEntry]:
    found = (FACTOR_NAME.fullmatch(name) for name in sorted(tensors))
    groups = ("adapter", "magnitude_adapter", "bias_adapter")
    names = sorted({next(filter(None, match.group(*groups)), "(none)") for match in found if match})
    return (
        [refused(", ".join(names), "adapter names; a file must hold one adapter")]
        if len(names) > 1
        else []
    )


def check_targets(
    pairs: Pairs, settings: Settings, targets: Iterable[str]
) -> tuple[list[str], list[LedgerEntry]]:
    """The targets that config, file and base agree on, and refusals for all others.

    The embedding's factors are not asked for here (`read_embedding`).
    """
    known = set(targets)
    implied = set(implied_targets(settings, sorted(known | set(EMBEDDINGS))))
    wanted = _wanted(settings)
    complete = {target for target, pair in pairs.items() if pair.keys() >= set(wanted)}
    agreed = sorted(complete & implied & known)
    ledger = foreign_modules(pairs.keys() | implied - {EMBEDDING}, pairs, known)
    ledger += [refused(each, NOT_IN_FILE) for each in sorted(implied & known - pairs.keys())]
    ledger += [refused(each, NOT_IN_CONFIG) for each in sorted(pairs.keys() & known - implied)]
    for target, pair in sorted(pairs.items()):
        ledger += [refused(target, f"has no lora_{each}") for each in wanted if each not in pair]
        ledger += [refused(pair[each], SWITCHED_OFF[each]) for each in pair if each not in wanted]
    if not pairs and EMBEDDING not in implied:
        ledger.append(refused("adapter_model.safetensors", "holds no lora_A and lora_B"))
    ledger += unmatched_patterns(settings, implied) + overlapping_alphas(settings, agreed)
    return agreed, ledger + unmatched_names(settings, known | set(EMBEDDINGS))


def _wanted(settings: Settings) -> tuple[str, ...]:
    optional = {MAGNITUDE: settings.use_dora, BIAS: settings.lora_bias}
    return ("A", "B", *(factor for factor, is_used in optional.items() if is_used))


def foreign_modules(
    named: set[str], in_file: Collection[str], known: set[str]
) -> list[LedgerEntry]:
    matching = len(known.intersection(in_file))
    hint = f"{matching} of the adapter's {len(in_file)} modules match"
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
    rows, columns = size
    width = (tensors[pair["A"]].shape or (0,))[-1]
    group = inputs_of_a_mean(width, columns, settings.qalora_group_size)
    shapes = {"A": (rank, columns // group), "B": (rows, rank), MAGNITUDE: (rows,), BIAS: (rows,)}
    names = {factor: pair[factor] for factor in shapes if factor in pair}
    bad = [check_tensor(name, tensors[name], shapes[factor]) for factor, name in names.items()]
    if any(bad):
        return None, [entry for entries in bad for entry in entries]
    values = {factor: tensors[name].values() for factor, name in names.items()}
    bias = _scaled(values.get(BIAS), scaling)
    if bias is not None and not np.isfinite(bias).all():
        return None, [refused(pair[BIAS], f"times scaling {scaling:g} is not finite")]
    lora_a = expanded(values["A"], group) if group > 1 else values["A"]
    branch = Branch(lora_a, values["B"], scaling, values.get(MAGNITUDE), bias=bias, group=group)
    pooled = ", of means of inputs (QA-LoRA)" if group > 1 else ""
    reason = f"rank {rank}, scaling {scaling:g}{pooled}{_what_else(branch)}"
    return branch, [exported(name, reason) for name in names.values()]


def _scaled(bias: Factor | None, scaling: float) -> NDArray[np.float32] | None:
    """As PEFT: lora_B, its bias too, times scaling."""
    if bias is None:
        return None
    with np.errstate(over="ignore"):
        return bias.astype(np.float32) * np.float32(scaling)


def _what_else(branch: Branch) -> str:
    if branch.magnitude is not None:
        return ", then rows of the magnitude's length (DoRA)"
    if branch.bias is None and not (branch.lora_a.any() and branch.lora_b.any()):
        return "; all zero, so it changes nothing"
    return "" if branch.bias is None else ", with a bias of its own"


def check_tensor(name: str, tensor: StoredTensor, expected: tuple[int, ...]) -> list[LedgerEntry]:
    """A refusal if it is not finite floats of that shape."""
    if not tensor.is_float:
        return [refused(name, f"dtype {tensor.dtype}; must be float32, float16 or bfloat16")]
    if tensor.shape != expected:
        return [
            refused(name, f"shape {list(tensor.shape)}, but config and base need {list(expected)}")
        ]
    if not np.isfinite(tensor.values()).all():
        return [refused(name, "holds NaN or infinity")]
    return []
