"""Greedy answers to held-out prompts, their scores, and the record of both."""

import json

import click
import torch
from base import load_base, prompt_ids, quantize_base
from peft import PeftModel
from recipes import ADAPTERS, HERE, Recipe, read_examples
from scores import share
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

NEW_TOKENS = 64


@torch.no_grad()
def answer(model: torch.nn.Module, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """Greedy answers, all prompts in one batch."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    out = model.generate(
        **batch, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    new = out[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def adapter_answers(
    recipe: Recipe, base: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str]
) -> list[str]:
    """The answers with the stored adapter; the base is left as it came."""
    adapted = PeftModel.from_pretrained(base, str(ADAPTERS / recipe.name)).eval()
    answers = answer(adapted, tokenizer, prompts)
    adapted.unload()
    return answers


def held_out_answers(recipe: Recipe, prompts: list[str]) -> dict[str, list[str]]:
    """What the base, the base told in words, and the adapter say; QLoRA on both of its bases."""
    base, tokenizer = load_base()
    answers = {
        "base": answer(base, tokenizer, prompts),
        "base, told": answer(base, tokenizer, [recipe.instruction + text for text in prompts]),
        "adapter": adapter_answers(recipe, base, tokenizer, prompts),
    }
    if recipe.train_base == "nf4":
        quantize_base(base)
        answers["nf4 base"] = answer(base, tokenizer, prompts)
        answers["nf4 base, adapter"] = adapter_answers(recipe, base, tokenizer, prompts)
    return answers


def judge(recipe: Recipe) -> dict[str, object]:
    """The scores of one adapter, as they are recorded."""
    held_out = read_examples(f"{recipe.name}_held_out.jsonl")
    prompts = [example["prompt"] for example in held_out]
    answers = held_out_answers(recipe, prompts)
    spoken = [
        {"prompt": prompt, "base": plain, "adapter": adapted}
        for prompt, plain, adapted in zip(prompts, answers["base"], answers["adapter"], strict=True)
    ]
    return {
        "held_out": len(prompts),
        "bytes": (ADAPTERS / recipe.name / "adapter_model.safetensors").stat().st_size,
        "scores": {
            metric: {who: share(score, held_out, said) for who, said in answers.items()}
            for metric, score in recipe.scores.items()
        },
        "answers": spoken,
    }


def record(name: str, result: dict[str, object]) -> None:
    """Replace one adapter's entry of scores.json."""
    path = HERE / "scores.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    scores[name] = result
    path.write_text(json.dumps(scores, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def show(name: str, result: dict[str, dict[str, dict[str, float]]]) -> None:
    for metric, columns in result["scores"].items():
        cells = "   ".join(f"{who} {value:.0%}" for who, value in columns.items())
        click.echo(f"{name:8}{metric:8}{cells}")
