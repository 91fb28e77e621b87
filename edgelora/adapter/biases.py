"""Biases that an adapter trained: each takes the place of the base's own (LoraConfig's `bias`)."""

import re
from collections.abc import Iterable, Mapping

from edgelora.adapter.branches import Pairs, check_tensor
from edgelora.adapter.ledger import LedgerEntry, exported, refused
from edgelora.adapter.settings import Settings
from edgelora.adapter.tensors import Factor, StoredTensor

# PEFT 0.21.2 saves and loads `base_layer.bias` of a linear that it adapts, `bias` of any other.
NAME = re.compile(
    r"base_model\.model\.(?P<target>((?!\.lora_).)+?)(?P<adapted>\.base_layer)?\.bias"
)


def is_trained_bias(name: str) -> bool:
    return NAME.fullmatch(name) is not None


def bias_targets(tensors: Iterable[str]) -> dict[str, str]:
    """Module path → tensor name."""
    found = (NAME.fullmatch(name) for name in sorted(tensors))
    return {match["target"]: match[0] for match in found if match}


def read_biases(
    tensors: Mapping[str, StoredTensor],
    settings: Settings,
    pairs: Pairs,
    targets: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, Factor], list[LedgerEntry]]:
    """The good ones by target, and the ledger of all."""
    biases, ledger = {}, []
    for name in filter(is_trained_bias, sorted(tensors)):
        if reason := _obstacle(name, settings, pairs, targets):
            ledger.append(refused(name, reason))
            continue
        target = NAME.fullmatch(name)["target"]  # type: ignore[index]
        if bad := check_tensor(name, tensors[name], targets[target][:1]):
            ledger += bad
            continue
        biases[target] = tensors[name].values()
        ledger.append(exported(name, "replaces the base's bias"))
    return biases, ledger


def _obstacle(name: str, settings: Settings, pairs: Pairs, targets: Iterable[str]) -> str | None:
    match = NAME.fullmatch(name)
    assert match is not None
    if settings.bias == "none":
        return "a trained bias, but the config says bias = none"
    if match["target"] not in targets:
        return "the base has no linear of this name that takes an adapter"
    if (match["adapted"] is not None) != (match["target"] in pairs):
        return "PEFT loads base_layer.bias of a linear with lora_A and lora_B, bias of any other"
    if settings.bias == "lora_only" and match["target"] not in pairs:
        return "the config says bias = lora_only, but the linear has no lora_A and lora_B"
    return None
