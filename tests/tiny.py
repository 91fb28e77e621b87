"""Tiny random bases for tests: Hugging Face folders, GGUF files, bitsandbytes folders.

Every function writes a complete base (weights, config, tokenizer) to `path`, seeded, in well under
a second, and returns `path`. Overrides are config values.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 384  # 256 bytes, two special tokens, the rest merges or unused rows
BOS, EOS = "<|begin|>", "<|end|>"
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 2.0**-17,  # a float32, as GGUF stores it
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE: Mapping[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "A base, an adapter and a bundle: the quick 123 and the brown 456.",
    "def jump(over):\n    return over + 1\n",
]


def tiny_llama(path: Path, *, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Llama; tie_word_embeddings, attention_bias, mlp_bias, rope_scaling … as overrides."""
    return _save(LlamaForCausalLM, LlamaConfig, path, seed, dtype, overrides)


def tiny_llama3_rope(path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Llama with a tied head and llama3 rotary scaling, all three of whose ranges occur."""
    changed = {
        "rope_theta": 500000.0,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": True,
        "rope_scaling": dict(LLAMA3_ROPE),
        **overrides,
    }
    return tiny_llama(path, seed=seed, **changed)


def tiny_mistral(path: Path, *, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Mistral with a window of 8 positions."""
    changed = {"sliding_window": 8, **overrides}
    return _save(MistralForCausalLM, MistralConfig, path, seed, dtype, changed)


def tiny_qwen2(path: Path, *, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Qwen2: biases on q, k and v."""
    changed = {"use_sliding_window": False, **overrides}
    return _save(Qwen2ForCausalLM, Qwen2Config, path, seed, dtype, changed)


def tiny_qwen3(path: Path, *, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Qwen3: norms on q and k; heads wider than hidden_size / heads."""
    changed = {"head_dim": 32, **overrides}
    return _save(Qwen3ForCausalLM, Qwen3Config, path, seed, dtype, changed)


def load_float(path: Path) -> PreTrainedModel:
    """What transformers reads from a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def float_values(path: Path) -> dict[str, np.ndarray]:
    """Name → float32 values as transformers reads them; a tied head is left out."""
    model = load_float(path)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {n: v.numpy() for n, v in model.state_dict().items() if n not in tied}


def edit_config(path: Path, **changes: Any) -> None:
    """Sets keys of config.json; a value of `...` removes the key."""
    file = path / "config.json"
    values = json.loads(file.read_text())
    values |= changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def _save(
    model_class: Any,
    config_class: Any,
    path: Path,
    seed: int,
    dtype: str,
    overrides: Mapping[str, Any],
) -> Path:
    config = config_class(**{**SIZES, **overrides})
    with _seeded(seed):
        model = model_class(config)
        _spread(model)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    write_tokenizer(path)
    return path


def _spread(model: PreTrainedModel) -> None:
    """Random norms and biases too, so that a mistake in them shows."""
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("norm.weight"):
                values.add_(0.2 * torch.randn_like(values))
            elif name.endswith(".bias"):
                values.copy_(0.1 * torch.randn_like(values))
            else:
                values.copy_(torch.randn_like(values) / values.shape[1] ** 0.5)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE: 256 bytes and some merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def write_tokenizer(path: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    byte_level_tokenizer().save(str(path / "tokenizer.json"))
    settings = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    """Hugging Face's tensor name → llama.cpp's."""
    name = name.replace("model.layers.", "blk.")
    for theirs, ours in sorted(GGUF_NAMES.items(), key=lambda item: -len(item[0])):
        name = name.replace(theirs, ours)
    return name


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a q or k matrix's rows (LlamaModel.permute in convert_hf_to_gguf.py)."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def tiny_gguf(
    path: Path,
    types: str | Mapping[str, str] = "F32",
    *,
    architecture: str = "llama",
    source: Path | None = None,
    fields: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    pre: str = "gpt-2",
) -> Path:
    """A GGUF as llama.cpp's converter and quantizer would write it, into the file `path`.

    types: a ggml type for all matrices, or GGUF tensor name → type, with "" for the rest; vectors
    are F32. source: the Hugging Face folder to convert (made beside `path` if not given).
    fields, extra: more fields, more F32 tensors.
    """
    if source is None:
        maker = {"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3}[architecture]
        source = maker(path.parent / f"{path.stem}-source")
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    _add_config(writer, config, fields or {})
    _add_tokenizer(writer, source, pre)
    for name, values in float_values(source).items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            values = interleave(values, config[key])
        _add_tensor(writer, gguf_name(name), values, types)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray, types: str | Mapping[str, str]
) -> None:
    chosen = types if isinstance(types, str) else types.get(name, types.get("", "F32"))
    if values.ndim == 1 or chosen == "F32":
        writer.add_tensor(name, np.ascontiguousarray(values))
        return
    kind = gguf.GGMLQuantizationType[chosen]
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _add_config(
    writer: gguf.GGUFWriter, config: Mapping[str, Any], fields: Mapping[str, Any]
) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    for key, value in fields.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }[type(value)]
        add(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path, pre: str) -> None:
    """The source's tokenizer, padded with unused tokens to the embedding's rows, as llama.cpp's."""
    description = json.loads((source / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in description["added_tokens"]}
    types = [3 if token in special else 1 for token in tokens]
    padding = VOCAB_SIZE - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *(f"[PAD{len(tokens) + i}]" for i in range(padding))])
    writer.add_token_types([*types, *([5] * padding)])
    writer.add_token_merges([" ".join(pair) for pair in description["model"]["merges"]])
    writer.add_bos_token_id(tokens.index(BOS))
    writer.add_eos_token_id(tokens.index(EOS))
    writer.add_chat_template(CHAT_TEMPLATE)


def tiny_bitsandbytes(
    path: Path,
    *,
    dtype: str = "float32",
    quant_type: str = "nf4",
    double_quant: bool = True,
    architecture: str = "llama",
    **overrides: Any,
) -> Path:
    """A 4-bit folder as transformers saves it; head, embedding and norms are in `dtype`.

    The float folder that it was made from stays beside it, as `<path>-source`.
    """
    makers = {"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3}
    source = makers[architecture](path.with_name(f"{path.name}-source"), **overrides)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=settings, dtype=getattr(torch, dtype), device_map="cpu"
        )
        model.save_pretrained(path)
    write_tokenizer(path)
    return path
