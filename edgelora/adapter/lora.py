"""LoRA (Hu et al. 2021) with what PEFT adds to it: DoRA, biases, modules saved whole."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgelora.adapter.biases import bias_targets, is_trained_bias, read_biases
from edgelora.adapter.branches import Branch, Pairs, check_targets, pair_factors, read_branch
from edgelora.adapter.copies import read_copies, without_copies
from edgelora.adapter.embedding import embedding_factors, read_embedding
from edgelora.adapter.judged import Judged, Targets
from edgelora.adapter.ledger import LedgerEntry
from edgelora.adapter.replaced import Replaced, is_replaced, read_replaced, with_tied
from edgelora.adapter.settings import Settings, read_settings
from edgelora.adapter.targets import check_patterns
from edgelora.adapter.tensors import Factor, StoredTensor

Tensors = Mapping[str, StoredTensor]


def own_targets(config: Mapping[str, Any], tensors: Tensors) -> dict[str, tuple[int, int]]:
    """The targets that the file itself names, with the sizes of its own factors; of QA-LoRA as if
    all were of pooled inputs.
    """
    settings, _ = read_settings(config)
    group = (settings.qalora_group_size if settings else None) or 1
    pairs, _ = pair_factors(_factors(tensors))
    biases = {target: tensors[name] for target, name in bias_targets(tensors).items()}
    alone = {target: (bias.shape[0], 0) for target, bias in biases.items() if bias.shape}
    return alone | {
        target: (tensors[pair["B"]].shape[0], group * tensors[pair["A"]].shape[-1])
        for target, pair in pairs.items()
        if pair.keys() >= {"A", "B"} and tensors[pair["A"]].shape and tensors[pair["B"]].shape
    }


def judge(config: Mapping[str, Any], tensors: Tensors, targets: Targets) -> Judged:
    settings, ledger = read_settings(config)
    if settings is None:
        return Judged({}, Replaced(), ledger + pair_factors(without_copies(_factors(tensors)))[1])
    settings = with_tied(settings, tensors)
    replaced, entries = read_replaced(tensors, settings)
    tensors = {n: t for n, t in tensors.items() if not is_replaced(n, settings)}
    copies, found = read_copies(tensors, targets.get("lm_head"))
    pairs, refused_tensors = pair_factors(without_copies(_factors(tensors)))
    ledger += entries + found + refused_tensors
    if bad_patterns := check_patterns(settings):
        return Judged({}, Replaced(), ledger + bad_patterns)
    embedding, found = read_embedding(tensors, settings, targets.get("lm_head"))
    branches, entries = _read_branches(tensors, settings, pairs, targets)
    replaced = replace(replaced, embedding=embedding)
    return Judged(branches, replaced, ledger + found + entries, copies=copies)


def _factors(tensors: Collection[str]) -> list[str]:
    others = {*embedding_factors(tensors).values()}
    return [name for name in tensors if not is_trained_bias(name) and name not in others]


def _read_branches(
    tensors: Tensors, settings: Settings, pairs: Pairs, targets: Targets
) -> tuple[dict[str, Branch], list[LedgerEntry]]:
    agreed, ledger = check_targets(pairs, settings, targets)
    branches = {}
    for target in agreed:
        branch, entries = read_branch(tensors, pairs[target], settings, target, targets[target])
        ledger += entries
        if branch is not None:
            branches[target] = branch
    biases, entries = read_biases(tensors, settings, pairs, targets)
    return _with_biases(branches, biases, targets), ledger + entries


def _with_biases(
    branches: Mapping[str, Branch], biases: Mapping[str, Factor], targets: Targets
) -> dict[str, Branch]:
    """Sorted; a target that has a bias alone gets a branch of rank 0."""
    result = dict(branches)
    for target, bias in biases.items():
        branch = result.get(target) or Branch.of_rank_0(targets[target])
        result[target] = replace(branch, trained_bias=bias)
    return dict(sorted(result.items()))
