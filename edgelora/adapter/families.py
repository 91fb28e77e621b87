"""Which reader a PEFT folder goes to by its peft_type, and why all other kinds are refused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgelora.adapter import adalora, ia3, lora, prompt_learning
from edgelora.adapter.fields import MERGE
from edgelora.adapter.judged import Judged, Targets
from edgelora.adapter.tensors import StoredTensor
from edgelora.errors import EdgeLoraError

Tensors = Mapping[str, StoredTensor]


class Family(NamedTuple):
    """own_targets: what the file itself names, with sizes that fit its tensors."""

    own_targets: Callable[[Mapping[str, Any], Tensors], Targets]
    judge: Callable[[Mapping[str, Any], Tensors, Targets], Judged]


def _before_text(judge: prompt_learning.Judge) -> Family:
    return Family(prompt_learning.no_targets, judge)


FAMILIES: Mapping[str, Family] = {
    "LORA": Family(lora.own_targets, lora.judge),
    "ADALORA": Family(adalora.own_targets, adalora.judge),
    "IA3": Family(ia3.own_targets, ia3.judge),
    "PREFIX_TUNING": _before_text(prompt_learning.judges_keys(prompt_learning.PREFIX_TUNING)),
    "CARTRIDGE": _before_text(prompt_learning.judges_keys(prompt_learning.CARTRIDGE)),
    "PROMPT_TUNING": _before_text(prompt_learning.judges_embeddings(prompt_learning.PROMPT_TUNING)),
    "P_TUNING": _before_text(prompt_learning.judges_embeddings(prompt_learning.P_TUNING)),
}

CONVERT = f"PEFT's save_as_lora(FOLDER, model, rank) makes LoRA of it, nearly the same; or {MERGE}"
RETRAIN = "nothing of it can be merged: train LoRA, DoRA, (IA)³ or a prompt instead"

# peft_type: (its name, what to say); PEFT 0.21.2 knows these and FAMILIES.
REFUSED: Mapping[str, tuple[str, str]] = {
    "ADAMSS": ("AdaMSS", f"its updates lie in subspaces of the base weight; {MERGE}"),
    "ADAPTION_PROMPT": ("LLaMA-Adapter", f"it adds trained prompts inside attention; {RETRAIN}"),
    "BEFT": ("BEFT", f"it adds biases of its own; {MERGE}"),
    "BOFT": ("BOFT", f"it rotates the base weight; {MERGE}"),
    "C3A": ("C³A", f"its updates are circular convolutions; {CONVERT}"),
    "CPT": (
        "context-aware prompt tuning",
        "it trains changes of given tokens' embeddings; train prompt tuning instead",
    ),
    "DEFT": ("DEFT", f"it projects the base weight; {MERGE}"),
    "DELORA": ("DeLoRA", f"its factors are normalized; {CONVERT}"),
    "FOURIERFT": ("FourierFT", f"its updates are sums of waves; {CONVERT}"),
    "FROD": ("FRoD", f"it rotates the base weight; {MERGE}"),
    "GLORA": ("GLoRA", f"it multiplies the base weight and its bias; {MERGE}"),
    "GRALORA": ("GraLoRA", f"its factors are of blocks of the weight; {CONVERT}"),
    "HIRA": ("HiRA", f"its updates are multiplied by the base weight; {CONVERT}"),
    "HRA": ("HRA", f"it reflects the base weight; {MERGE}"),
    "LILY": ("Lily", f"its factors are shared and mixed between layers by a router; {RETRAIN}"),
    "LN_TUNING": ("LN tuning", f"it trains norms, which all adapters share; {MERGE}"),
    "LOHA": ("LoHa", f"its updates are Hadamard products of factors; {CONVERT}"),
    "LOKR": ("LoKr", f"its updates are Kronecker products of factors; {CONVERT}"),
    "MISS": ("MiSS", f"its factors are shared by pieces of rows; {CONVERT}"),
    "MULTITASK_PROMPT_TUNING": (
        "multitask prompt tuning",
        "its prompts depend on a task's number; train prompt tuning instead, one a task",
    ),
    "OFT": ("OFT", f"it rotates the base weight; {MERGE}"),
    "OSF": ("OSF", f"it trains a part of the base weight itself; {MERGE}"),
    "PEANUT": ("PEANuT", f"its updates are a network's of the base weight; {MERGE}"),
    "POLY": ("Poly", f"it mixes factors by task; {RETRAIN}"),
    "PSOFT": ("PSOFT", f"its factors are made of the base weight; {CONVERT}"),
    "PVERA": ("PVeRA", f"its factors are random ones that all layers share; {MERGE}"),
    "RANDLORA": ("RandLoRA", f"its factors are random ones that all layers share; {CONVERT}"),
    "ROAD": ("RoAd", f"it rotates pairs of outputs; {MERGE}"),
    "SHADOW": ("ShadowPEFT", f"it runs a second network beside the base; {RETRAIN}"),
    "SHIRA": ("SHiRA", f"its updates are sparse, not low-rank; {CONVERT}"),
    "SUPERTUNING": ("Super-Tuning", f"its updates are sparse, not low-rank; {MERGE}"),
    "TINYLORA": ("TinyLoRA", f"its factors are made of the base weight; {CONVERT}"),
    "TRAINABLE_TOKENS": (
        "trainable tokens alone",
        f"it has no LoRA beside them; train LoRA with trainable_token_indices, or {MERGE}",
    ),
    "UNILORA": ("Uni-LoRA", f"its factors come from one shared vector; {CONVERT}"),
    "VBLORA": ("VB-LoRA", f"its factors come from a shared vector bank; {CONVERT}"),
    "VERA": ("VeRA", f"its factors are random ones that all layers share; {CONVERT}"),
    "WAVEFT": ("WaveFT", f"its updates are sums of wavelets; {CONVERT}"),
    "XLORA": ("X-LoRA", f"it mixes adapters token by token with a classifier; {RETRAIN}"),
}

# Names of files that the library `adapters` (AdapterHub) writes, and PEFT never.
ADAPTER_HUB = (
    "pytorch_adapter.bin",
    "adapter.safetensors",
    "head_config.json",
    "pytorch_model_head.bin",
    "model_head.safetensors",
    "pytorch_adapter_fusion.bin",
    "adapter_fusion_config.json",
)


def is_adapter_hub(path: Path) -> bool:
    """Whether the folder holds an adapter of the library `adapters` (bottleneck and others)."""
    return any((path / name).is_file() for name in ADAPTER_HUB)


def refuse_adapter_hub(path: Path) -> None:
    """Raises EdgeLoraError for a folder of that library."""
    if is_adapter_hub(path):
        raise EdgeLoraError(
            f"{path}: an adapter of the library `adapters` (AdapterHub), not of PEFT: bottleneck "
            "layers, prefixes and heads are not supported; train LoRA, DoRA or (IA)³ with PEFT"
        )


def family_of(config: Mapping[str, Any], path: Path) -> Family:
    """Raises EdgeLoraError with the reason if there is no reader for its peft_type."""
    kind = config.get("peft_type")
    if kind is None:
        raise EdgeLoraError(
            f"{path}: no peft_type in its config: not saved by PEFT; save it with PEFT again"
        )
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    if isinstance(kind, str) and kind in REFUSED:
        name, why = REFUSED[kind]
        raise EdgeLoraError(f"{path}: peft_type {kind}: {name} is not supported: {why}")
    raise EdgeLoraError(
        f"{path}: peft_type {kind!r:.60}: PEFT 0.21.2 has no such kind, so its meaning is unknown; "
        f"supported are {', '.join(FAMILIES)}; update edgelora, or {MERGE}"
    )
