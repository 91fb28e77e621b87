"""Prompt learning: virtual tokens before the text, as keys and values (prefix tuning, Li & Liang
2021; cartridges, Eyuboglu et al. 2025) or as embeddings (prompt tuning, Lester et al. 2021;
p-tuning, Liu et al. 2021).

PEFT 0.21.2 (`peft_model.py`, get_prompt) saves what an encoder made of its parameters, so that all
is one tensor: prompt_embeddings [num_virtual_tokens, ·], a row of 2·num_layers·token_dim or of
token_dim values.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgelora.adapter.branches import check_tensor
from edgelora.adapter.fields import Fields, check_version, is_broken, is_rank
from edgelora.adapter.judged import Judged, Targets
from edgelora.adapter.ledger import LedgerEntry, exported, refused
from edgelora.adapter.prefix import Array, Prefix, SoftPrompt
from edgelora.adapter.replaced import Replaced
from edgelora.adapter.settings import HARMLESS
from edgelora.adapter.tensors import StoredTensor

Tensors = Mapping[str, StoredTensor]
Values = Mapping[str, Any]

TENSOR = "prompt_embeddings"
SAVE_AGAIN = "must be a positive integer; save the adapter with PEFT again"
ENCODED = "made the embeddings, which are saved without their encoder"
START = "decides how the embeddings start, not what they mean"
SIZES = ("num_virtual_tokens", "token_dim")
LAYER_SIZES = ("num_layers", "num_attention_heads")
NO_LAYERS = dict.fromkeys(LAYER_SIZES, "of the base; embeddings have neither")


def _fields(owner: str, peft_type: str, names: tuple[str, ...], **harmless: str) -> Fields:
    sizes = dict.fromkeys(names, (None, is_rank, SAVE_AGAIN))
    kind = (None, lambda value: value == peft_type, f"must be {peft_type}")
    common = ("auto_mapping", "base_model_name_or_path", "revision", "task_type")
    return Fields(
        owner,
        exported={"peft_type": kind, **sizes},
        harmless={name: HARMLESS[name] for name in (*common, "inference_mode")} | harmless,
        off={
            "num_transformer_submodules": ((1, None), "2 is for encoder-decoder models"),
            "modules_to_save": (
                (None, []),
                "modules saved whole beside a prompt: train it without them",
            ),
        },
        judged={"peft_version": check_version},
    )


PREFIX_TUNING = _fields(
    "PrefixTuningConfig",
    "PREFIX_TUNING",
    SIZES + LAYER_SIZES,
    encoder_hidden_size=ENCODED,
    prefix_projection=ENCODED,
    init_weights=START,
)
CARTRIDGE = _fields(
    "CartridgeConfig", "CARTRIDGE", SIZES + LAYER_SIZES, num_frozen_tokens="training only"
)
PROMPT_TUNING = _fields(
    "PromptTuningConfig",
    "PROMPT_TUNING",
    SIZES,
    **NO_LAYERS,
    prompt_tuning_init=START,
    prompt_tuning_init_text=START,
    tokenizer_name_or_path=START,
    tokenizer_kwargs=START,
)
P_TUNING = _fields(
    "PromptEncoderConfig",
    "P_TUNING",
    SIZES,
    **NO_LAYERS,
    encoder_reparameterization_type=ENCODED,
    encoder_hidden_size=ENCODED,
    encoder_num_layers=ENCODED,
    encoder_dropout=ENCODED,
)

Judge = Callable[[Mapping[str, Any], Tensors, Targets], Judged]


def no_targets(config: Mapping[str, Any], tensors: Tensors) -> dict[str, tuple[int, int]]:
    """None of these families changes a linear."""
    return {}


def judges_keys(fields: Fields) -> Judge:
    """Of a family that saves keys and values."""
    return lambda config, tensors, _: _judge(fields, config, tensors, _KeysAndValues())


def judges_embeddings(fields: Fields) -> Judge:
    """Of a family that saves embeddings."""
    return lambda config, tensors, _: _judge(fields, config, tensors, _Embeddings())


class _KeysAndValues:
    meaning = "keys and values before the text"

    def problems(self, values: Values) -> list[LedgerEntry]:
        if values["token_dim"] % values["num_attention_heads"] == 0:
            return []
        return [refused(f"token_dim = {values['token_dim']}", "no multiple of num_attention_heads")]

    def width(self, values: Values) -> int:
        return int(2 * values["num_layers"] * values["token_dim"])

    def read(self, rows: Array, values: Values) -> Prefix:
        """PEFT's view [positions, 2·layers, heads, head_dim]: keys in the even layers."""
        heads = values["num_attention_heads"]
        shape = (len(rows), values["num_layers"], 2, heads, values["token_dim"] // heads)
        both = rows.reshape(shape).transpose(2, 1, 3, 0, 4)
        return Prefix(np.ascontiguousarray(both[0]), np.ascontiguousarray(both[1]))


class _Embeddings:
    meaning = "embeddings before the text, as the keys and values that the base makes of them"

    def problems(self, values: Values) -> list[LedgerEntry]:
        return []

    def width(self, values: Values) -> int:
        return int(values["token_dim"])

    def read(self, rows: Array, values: Values) -> SoftPrompt:
        return SoftPrompt(rows)


def _judge(
    fields: Fields, config: Mapping[str, Any], tensors: Tensors, kind: _KeysAndValues | _Embeddings
) -> Judged:
    values, ledger = fields.values(config), fields.ledger(config)
    ledger += [refused(name, f"PEFT saves {TENSOR} alone") for name in tensors if name != TENSOR]
    if is_broken(fields, ledger):
        return Judged({}, Replaced(), ledger)
    problems = kind.problems(values) or _check(tensors, values, kind.width(values))
    if problems:
        return Judged({}, Replaced(), ledger + problems)
    rows = np.asarray(tensors[TENSOR].values(), np.float32)
    ledger.append(exported(TENSOR, kind.meaning))
    return Judged({}, Replaced(), ledger, kind.read(rows, values))


def _check(tensors: Tensors, values: Values, width: int) -> list[LedgerEntry]:
    if TENSOR not in tensors:
        return [refused("adapter_model.safetensors", f"holds no {TENSOR}")]
    return check_tensor(TENSOR, tensors[TENSOR], (values["num_virtual_tokens"], width))
