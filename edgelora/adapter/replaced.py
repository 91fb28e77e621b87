"""What an adapter saved whole: modules (`modules_to_save`), and rows of tokens
(`trainable_token_indices`). Each takes the place of the base's; so does an embedding with factors.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from edgelora.adapter.branches import Branch
from edgelora.adapter.ledger import LedgerEntry, exported, harmless, refused
from edgelora.adapter.settings import TOKEN_MODULES, Settings, Targeting, Tokens
from edgelora.adapter.tensors import Factor, StoredTensor

PREFIX = "base_model.model."
FACTOR = re.compile(r"\.(lora_|ia3_l)")
ROWS = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta")


# Of a grown vocabulary PEFT writes a saved embedding or head three times.
COPY = re.compile(
    r"(?P<module>.+\.(embed_tokens|lm_head))\.(modules_to_save|original_module)\.weight"
)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a matrix."""

    tokens: tuple[int, ...]
    values: Factor  # [tokens, in_features]


@dataclass(frozen=True, eq=False)
class Replaced:
    """By the base's tensor names; and the settings that they follow."""

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    tokens: Tokens = field(default_factory=dict)
    embedding: Branch | None = None  # added to the embedding [vocab_size, hidden_size]

    def __bool__(self) -> bool:
        return bool(self.tensors or self.rows or self.embedding)

    @property
    def token_rows(self) -> int:
        """Of the greatest embedding or lm_head that was saved whole; 0 without any."""
        names = (f"{module}.weight" for module in TOKEN_MODULES)
        shapes = (self.tensors[name].shape for name in names if name in self.tensors)
        return max((shape[0] for shape in shapes if shape), default=0)


def is_saved(tensor: str, modules_to_save: Iterable[str]) -> bool:
    """Whether it belongs to a module that was saved whole."""
    return bool(_saved_modules(tensor, modules_to_save))


def _saved_modules(tensor: str, modules_to_save: Iterable[str]) -> list[str]:
    """Of the modules that it lies in, those whose paths end with one of the names, as PEFT looks
    for them (`_set_trainable` in peft/utils/other.py): without regard to dots.
    """
    parts, names = tensor.removeprefix(PREFIX).split(".")[:-1], tuple(modules_to_save)
    paths = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return [path for path in paths if path.endswith(names)]


def with_tied(settings: Settings, tensors: Mapping[str, StoredTensor]) -> Settings:
    """With ensure_weight_tying PEFT saves an embedding of a tied base as lm_head too, the same."""
    saved, names = settings.modules_to_save, [f"{PREFIX}{each}.weight" for each in TOKEN_MODULES]
    if not settings.ensure_weight_tying or not any(is_saved(name, saved) for name in names):
        return settings
    found = [tensors[name] for name in names if name in tensors]
    if len(found) < len(names) or found[0].data != found[1].data:
        return settings
    return replace(settings, modules_to_save=tuple(dict.fromkeys((*saved, *TOKEN_MODULES))))


def is_replaced(tensor: str, settings: Targeting) -> bool:
    """Whether a tensor of the file is one of these, not part of a branch."""
    factor = FACTOR.search(tensor) is not None or not tensor.startswith(PREFIX)
    saved = is_saved(tensor, settings.modules_to_save)
    return ROWS.fullmatch(tensor) is not None or (saved and not factor)


def read_replaced(
    tensors: Mapping[str, StoredTensor], settings: Targeting
) -> tuple[Replaced, list[LedgerEntry]]:
    """The good ones, and the ledger of all. What the base must have is not asked yet."""
    saved: dict[str, StoredTensor] = {}
    rows: dict[str, Rows] = {}
    ledger = _unmatched(tensors, settings)
    for name in sorted(each for each in tensors if is_replaced(each, settings)):
        tensor, match = tensors[name], ROWS.fullmatch(name)
        copy = COPY.fullmatch(name)
        if copy and f"{copy['module']}.weight" in tensors:
            ledger.append(harmless(name, f"PEFT reads {copy['module']}.weight"))
            continue
        module = match and match["module"]
        misfit = _no_rows(module, tensor, settings) if module else _nested(name, settings)
        if reason := _obstacle(tensor) or misfit:
            ledger.append(refused(name, reason))
        elif match:
            ids = tokens_of(match["module"], settings.trainable_token_indices)
            rows[f"{match['module']}.weight"] = Rows(ids, tensor.values())
            ledger.append(exported(name, f"{len(ids)} rows replace the base's: --mode merge"))
        else:
            saved[name.removeprefix(PREFIX)] = tensor
            ledger.append(exported(name, "replaces the base's: --mode merge"))
    tokens = settings.trainable_token_indices
    return Replaced(saved, rows, settings.modules_to_save, tokens), ledger


def tokens_of(module: str, tokens: Tokens) -> tuple[int, ...]:
    """Of the first name that ends the module's path; none if there is no such name."""
    return next((ids for name, ids in tokens.items() if module.endswith(name)), ())


def _unmatched(tensors: Iterable[str], settings: Targeting) -> list[LedgerEntry]:
    """A refusal for every name that has nothing in the file."""
    tensors = list(tensors)
    saved, tokens = settings.modules_to_save, settings.trainable_token_indices
    names = [name for name in saved if not any(is_saved(tensor, [name]) for tensor in tensors)]
    items = [f"modules_to_save {name!r}" for name in names]
    if tokens and not any(ROWS.fullmatch(tensor) for tensor in tensors):
        items.append("trainable_token_indices")
    return [refused(item, "the file has nothing of it; save the adapter again") for item in items]


def _obstacle(tensor: StoredTensor) -> str | None:
    if not tensor.is_float:
        return f"dtype {tensor.dtype}; must be float32, float16 or bfloat16"
    return None if np.isfinite(tensor.values()).all() else "holds NaN or infinity"


def _nested(name: str, settings: Targeting) -> str | None:
    """PEFT wraps both, and writes the inner one as the outer holds it, not as it was trained."""
    if len(_saved_modules(name, settings.modules_to_save)) < 2:
        return None
    return "in one of modules_to_save inside another: train the outer one alone"


def _no_rows(module: str, tensor: StoredTensor, settings: Targeting) -> str | None:
    tokens = tokens_of(module, settings.trainable_token_indices)
    if module not in TOKEN_MODULES or not tokens:
        return "the config's trainable_token_indices name no rows of this module"
    if len(tensor.shape) != len(("tokens", "in_features")) or tensor.shape[0] != len(tokens):
        return f"shape {list(tensor.shape)}, but the config names {len(tokens)} tokens"
    return None
