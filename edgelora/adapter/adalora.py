"""AdaLoRA (Zhang et al. 2023): LoRA with a factor for each rank, lora_E; training prunes ranks.

PEFT 0.21.2 (`peft/tuners/adalora`): W = W0 + alpha / (init_r + 1e-5) · B·diag(E)·A, whatever ranks
are left. Fields of LoraConfig that it leaves out of its arithmetic are refused unless off.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from edgelora.adapter.branches import (
    EMBEDDINGS,
    NOT_IN_CONFIG,
    Branch,
    check_tensor,
    foreign_modules,
)
from edgelora.adapter.copies import read_copies, without_copies
from edgelora.adapter.fields import Fields, check_version, is_broken, is_map_of
from edgelora.adapter.judged import Judged, Targets
from edgelora.adapter.ledger import LedgerEntry, exported, harmless, refused
from edgelora.adapter.replaced import Replaced, is_replaced, read_replaced
from edgelora.adapter.settings import (
    EXPORTED,
    HARMLESS,
    INVOCATION,
    REFUSED_UNLESS_OFF,
    Targeting,
    check_layers,
    targeting,
)
from edgelora.adapter.targets import check_patterns, implied_targets, unmatched_names
from edgelora.adapter.tensors import StoredTensor

Tensors = Mapping[str, StoredTensor]
Triples = dict[str, dict[str, str]]  # target → "A", "B", "E" → tensor name

NAME = re.compile(r"base_model\.model\.(?P<target>.+)\.lora_(?P<factor>[ABE])")
RANK_KEY = re.compile(r"(?P<target>.+)\.lora_E(\.[^.]+)?")
EPSILON = 1e-5  # PEFT's, beside the rank

_TARGETING = (
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)
_TRAINING = (
    "beta1",
    "beta2",
    "deltaT",
    "orth_reg_weight",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
)
_UNUSED: Mapping[str, tuple[object, ...]] = {
    "alpha_pattern": (None, {}),
    "bias": (None, "none"),
    "ensure_weight_tying": (None, False),
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_rslora": (None, False),
}


def _is_mask(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is bool for each in value)


FIELDS = Fields(
    "AdaLoraConfig",
    exported={name: EXPORTED[name] for name in _TARGETING}
    | {
        "peft_type": (None, lambda value: value == "ADALORA", "must be ADALORA"),
        "init_r": (12, EXPORTED["r"][1], EXPORTED["r"][2]),
        "rank_pattern": ({}, is_map_of(_is_mask), "must map modules to lists of true and false"),
    },
    harmless=HARMLESS
    | dict.fromkeys(_TRAINING, "training only")
    | {
        "init_lora_weights": "decides how the factors start, not what they mean",
        "qalora_group_size": "used only with use_qalora",
        "r": "AdaLoRA has init_r",
    },
    off=REFUSED_UNLESS_OFF
    | {INVOCATION: ((None,), "not supported with AdaLoRA")}
    | {name: (off, "not supported with AdaLoRA") for name, off in _UNUSED.items()},
    judged={"peft_version": check_version},
    never_null=("init_r", "lora_alpha"),
)


def own_targets(config: Mapping[str, Any], tensors: Tensors) -> dict[str, tuple[int, int]]:
    triples, _ = _by_target(tensors)
    shapes = {
        target: (tensors[names["B"]].shape, tensors[names["A"]].shape)
        for target, names in triples.items()
        if names.keys() >= {"A", "B"}
    }
    return {target: (b[0], a[-1]) for target, (b, a) in shapes.items() if a and b}


def judge(config: Mapping[str, Any], tensors: Tensors, targets: Targets) -> Judged:
    values = FIELDS.values(config)
    ledger = FIELDS.ledger(config) + check_layers(config, values)
    if is_broken(FIELDS, ledger):
        return Judged({}, Replaced(), ledger + _by_target(without_copies(tensors))[1])
    settings = targeting(values)
    replaced, entries = read_replaced(tensors, settings)
    tensors = {n: t for n, t in tensors.items() if not is_replaced(n, settings)}
    copies, copied = read_copies(tensors, targets.get("lm_head"))
    triples, refused_tensors = _by_target(without_copies(tensors))
    ledger += entries + copied + refused_tensors
    if bad := check_patterns(settings):
        return Judged({}, Replaced(), ledger + bad)
    agreed, entries = _check_targets(triples, settings, targets)
    ledger += entries
    ranks, entries = _ranks(values["rank_pattern"], triples)
    branches, read = _read(agreed, triples, tensors, targets, values, ranks)
    return Judged(branches, replaced, ledger + entries + read, copies=copies)


def _check_targets(
    triples: Triples, settings: Targeting, targets: Targets
) -> tuple[list[str], list[LedgerEntry]]:
    """Those that config, file and base agree on, and refusals for all others."""
    known, modules = set(targets), set(targets) | set(EMBEDDINGS)
    implied = set(implied_targets(settings, sorted(modules)))
    complete = {target for target, names in triples.items() if len(names) == len("ABE")}
    ledger = foreign_modules(triples.keys() | implied, triples, known)
    missing = sorted(implied & known - complete)
    ledger += [refused(each, "the file has not all of lora_A, lora_B, lora_E") for each in missing]
    ledger += [refused(each, NOT_IN_CONFIG) for each in sorted(triples.keys() & known - implied)]
    if not triples:
        ledger.append(refused("adapter_model.safetensors", "holds no lora_A, lora_B and lora_E"))
    return sorted(complete & implied & known), ledger + unmatched_names(settings, modules)


def _by_target(tensors: Iterable[str]) -> tuple[Triples, list[LedgerEntry]]:
    """Tensor names by target and factor; a refusal for every tensor that is none."""
    triples: Triples = {}
    ledger = []
    for name in sorted(tensors):
        if match := NAME.fullmatch(name):
            triples.setdefault(match["target"], {})[match["factor"]] = name
        else:
            reason = "not a factor of AdaLoRA as PEFT names it (base_model.model.<module>.lora_A)"
            ledger.append(refused(name, reason))
    return triples, ledger


def _ranks(
    pattern: Mapping[str, list[bool]], triples: Triples
) -> tuple[dict[str, int], list[LedgerEntry]]:
    """Those left of targets that were pruned."""
    ranks, ledger = {}, []
    for key, mask in pattern.items():
        match = RANK_KEY.fullmatch(key)
        if match is None or match["target"] not in triples:
            ledger.append(refused(f"rank_pattern {key!r}", "names no lora_E of the file"))
        else:
            ranks[match["target"]] = sum(mask)
    return ranks, ledger


def _read(
    agreed: list[str],
    triples: Triples,
    tensors: Tensors,
    targets: Targets,
    values: Mapping[str, Any],
    ranks: Mapping[str, int],
) -> tuple[dict[str, Branch], list[LedgerEntry]]:
    branches, ledger = {}, []
    scaling = values["lora_alpha"] / (values["init_r"] + EPSILON)
    for target in agreed:
        rank, (rows, columns) = ranks.get(target, values["init_r"]), targets[target]
        shapes = {"A": (rank, columns), "B": (rows, rank), "E": (rank, 1)}
        names = triples[target]
        bad = [check_tensor(names[each], tensors[names[each]], shapes[each]) for each in shapes]
        if any(bad):
            ledger += [entry for entries in bad for entry in entries]
        elif rank == 0:
            ledger += [harmless(name, "rank 0: changes nothing") for name in names.values()]
        else:
            branch = _branch({each: tensors[names[each]] for each in shapes}, scaling)
            reason = f"rank {rank}, scaling {scaling:g}, a factor for each rank (AdaLoRA)"
            branches[target] = branch
            ledger += [exported(name, reason) for name in names.values()]
    return branches, ledger


def _branch(factors: Mapping[str, StoredTensor], scaling: float) -> Branch:
    """lora_E is multiplied into lora_A, as PEFT does."""
    with np.errstate(over="ignore"):  # refused where it is written or merged
        lora_a = factors["A"].values().astype(np.float32) * factors["E"].values()
    return Branch(lora_a.astype(np.float32), factors["B"].values(), scaling)
