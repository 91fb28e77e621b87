"""(IA)³ (T-Few, Liu et al. 2022): a trained factor for each output of a linear, or for each input.

PEFT 0.21.2 (`peft/tuners/ia3`): y = l ⊙ (W·x + b), and of feedforward_modules y = W·(l ⊙ x) + b.
The input of an MLP's down_proj is silu(gate) ⊙ up: its input factors are up_proj's output factors.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter.branches import (
    EMBEDDINGS,
    NOT_IN_CONFIG,
    Branch,
    check_tensor,
    foreign_modules,
)
from edgelora.adapter.copies import read_copies, without_copies
from edgelora.adapter.fields import (
    TRANSPOSED,
    Fields,
    check_version,
    is_broken,
    is_names,
    is_text_or_names,
)
from edgelora.adapter.judged import Judged, Targets
from edgelora.adapter.ledger import LedgerEntry, exported, refused
from edgelora.adapter.replaced import Replaced, is_replaced, read_replaced
from edgelora.adapter.settings import HARMLESS, Targeting, frozen, targeting
from edgelora.adapter.targets import check_patterns, compiles, implied_targets, unmatched_names
from edgelora.adapter.tensors import StoredTensor

Float32 = NDArray[np.float32]
Tensors = Mapping[str, StoredTensor]
Names = str | tuple[str, ...]

NAME = re.compile(r"base_model\.model\.(?P<target>.+)\.ia3_l(?:\.(?P<adapter>[^.]+))?")
DOWN, UP = re.compile(r"(.*\.mlp)\.down_proj"), r"\1.up_proj"
NOT_IN_FILE = "named by target_modules, but the file has no ia3_l for it"

FIELDS = Fields(
    "IA3Config",
    exported={
        "peft_type": (None, lambda value: value == "IA3", "must be IA3"),
        "target_modules": (
            None,
            is_text_or_names,
            "must be a list of names or a regex; save the adapter with PEFT again",
        ),
        "feedforward_modules": (
            None,
            is_text_or_names,
            "must be a list of names or a regex; save the adapter with PEFT again",
        ),
        "exclude_modules": ([], is_text_or_names, "must be a list of names or a regex"),
        "modules_to_save": ([], is_names, "must be a list of names"),
    },
    harmless={
        name: HARMLESS[name]
        for name in (
            "auto_mapping",
            "base_model_name_or_path",
            "inference_mode",
            "revision",
            "runtime_config",
            "task_type",
        )
    }
    | {"init_ia3_weights": "decides how the factors start, not what they mean"},
    off={
        "fan_in_fan_out": ((False, None), TRANSPOSED),
    },
    judged={"peft_version": check_version},
)


def own_targets(config: Mapping[str, Any], tensors: Tensors) -> dict[str, tuple[int, int]]:
    """Of factors [out_features, 1] or [1, in_features]; the other size is 1 then."""
    found, _ = _by_target(tensors)
    shapes = {target: tensors[name].shape for target, name in found.items()}
    return {target: (shape[0], shape[1]) for target, shape in shapes.items() if len(shape) == 2}


def judge(config: Mapping[str, Any], tensors: Tensors, targets: Targets) -> Judged:
    values, ledger = FIELDS.values(config), FIELDS.ledger(config)
    if is_broken(FIELDS, ledger):
        return Judged({}, Replaced(), ledger + _by_target(without_copies(tensors))[1])
    settings = targeting(values)
    feedforward = frozen(values["feedforward_modules"])
    replaced, entries = read_replaced(tensors, settings)
    tensors = {n: t for n, t in tensors.items() if not is_replaced(n, settings)}
    copies, copied = read_copies(tensors, None)
    found, refused_tensors = _by_target(without_copies(tensors))
    ledger += entries + copied + refused_tensors
    if bad := check_patterns(settings) + _check_feedforward(feedforward):
        return Judged({}, Replaced(), ledger + bad)
    agreed, entries = _check_targets(found, settings, targets)
    ledger += entries
    branches, entries = _read(agreed, tensors, feedforward, targets)
    return Judged(branches, replaced, ledger + entries, copies=copies)


def is_feedforward(names: Names, module: str) -> bool:
    """PEFT's rule, which has no regard to dots (`_check_target_module_feedforward`)."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names)


def _check_feedforward(names: Names) -> list[LedgerEntry]:
    bad = isinstance(names, str) and not compiles(names)
    return [refused(f"feedforward_modules {names!r}", "not a valid regex")] if bad else []


def _by_target(tensors: Iterable[str]) -> tuple[dict[str, str], list[LedgerEntry]]:
    """Tensor names by target; a refusal for every tensor that is no factor or comes twice."""
    found: dict[str, str] = {}
    ledger, adapters = [], set()
    for name in sorted(tensors):
        match = NAME.fullmatch(name)
        if match is None:
            reason = "not a factor of (IA)³ as PEFT names it (base_model.model.<module>.ia3_l)"
            ledger.append(refused(name, reason))
        elif match["target"] in found:
            ledger.append(refused(name, f"a second ia3_l for the target {match['target']}"))
        else:
            found[match["target"]] = name
            adapters.add(match["adapter"] or "(none)")
    if len(adapters) > 1:
        names = ", ".join(sorted(adapters))
        ledger.append(refused(names, "adapter names; a file must hold one adapter"))
    return found, ledger


def _check_targets(
    found: Mapping[str, str], settings: Targeting, targets: Targets
) -> tuple[dict[str, str], list[LedgerEntry]]:
    """Those that config, file and base agree on, and refusals for all others."""
    known, modules = set(targets), set(targets) | set(EMBEDDINGS)
    implied = set(implied_targets(settings, sorted(modules)))
    ledger = foreign_modules(found.keys() | implied, found, known)
    ledger += [refused(each, NOT_IN_FILE) for each in sorted(implied & known - found.keys())]
    ledger += [refused(each, NOT_IN_CONFIG) for each in sorted(found.keys() & known - implied)]
    if not found:
        ledger.append(refused("adapter_model.safetensors", "holds no ia3_l"))
    agreed = {target: name for target, name in found.items() if target in implied & known}
    return agreed, ledger + unmatched_names(settings, modules)


def _read(
    agreed: Mapping[str, str], tensors: Tensors, feedforward: Names, targets: Targets
) -> tuple[dict[str, Branch], list[LedgerEntry]]:
    outputs: dict[str, Float32] = {}
    inputs: dict[str, Float32] = {}
    ledger = []
    for target, name in sorted(agreed.items()):
        of_inputs = is_feedforward(feedforward, target)
        rows, columns = targets[target]
        if bad := check_tensor(name, tensors[name], (1, columns) if of_inputs else (rows, 1)):
            ledger += bad
            continue
        (inputs if of_inputs else outputs)[target] = _flat(tensors[name])
        ledger.append(exported(name, _meaning(target, of_inputs=of_inputs)))
    ledger += _move_to_up(inputs, outputs)
    sizes = {**targets}
    for up, factors in outputs.items():
        sizes.setdefault(up, (len(factors), 1))  # a folder alone may not name it
    return {
        target: Branch.of_rank_0(
            sizes[target], output_factor=outputs.get(target), input_factor=inputs.get(target)
        )
        for target in sorted(outputs.keys() | inputs.keys())
    }, ledger


def _flat(tensor: StoredTensor) -> Float32:
    return tensor.values().astype(np.float32).reshape(-1)


def _meaning(target: str, *, of_inputs: bool) -> str:
    if not of_inputs:
        return "a factor of each output"
    if DOWN.fullmatch(target):
        return "a factor of each input, which is an output of up_proj"
    return "a factor of each input: --mode merge"


def _move_to_up(inputs: dict[str, Float32], outputs: dict[str, Float32]) -> list[LedgerEntry]:
    """down_proj's input factors become up_proj's output factors."""
    ledger = []
    for down in [target for target in inputs if DOWN.fullmatch(target)]:
        up, factors = DOWN.sub(UP, down), inputs.pop(down)
        with np.errstate(over="ignore"):
            outputs[up] = outputs[up] * factors if up in outputs else factors
        if not np.isfinite(outputs[up]).all():
            ledger.append(refused(down, "its factors times up_proj's are not finite"))
    return ledger
