"""An evaluation's float model is transformers' and PEFT's, its rounded ones are bundles'."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import edgelora
import oracle
import tiny
from edgelora.adapter import read_adapter
from edgelora.checkpoint import open_checkpoint, read_tokenizer
from edgelora.errors import EdgeLoraError
from edgelora.evaluation import (
    EvaluationText,
    Subject,
    Tally,
    Variant,
    Walk,
    evaluate,
    read_evaluation_text,
    survival,
)
from edgelora.inventory import take_inventory
from edgelora.layout import targets
from edgelora.plan import ExportOptions, make_plan
from edgelora.quantize import Int4Matrix, dequantize, quantize_int4
from edgelora.reporting import subject_of
from test_float_oracle import ARCHITECTURES, SHARE, make_adapter, with_adapter

KINDS = {
    "lora": {"target_modules": "all-linear", "use_rslora": True},
    "biases": {"target_modules": ["q_proj", "down_proj"], "lora_bias": True, "bias": "all"},
    "ia3": {
        "target_modules": ["v_proj", "o_proj", "up_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "dora_lm_head": {"target_modules": ["lm_head", "v_proj", "down_proj"], "use_dora": True},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ARCHITECTURES[request.param](tmp_path_factory.mktemp(request.param))


def read_text(base: Path, windows: int = 2, positions: int = 20) -> EvaluationText:
    vocab_size = open_checkpoint(base).config.vocab_size
    size = {"windows": windows, "positions": positions}
    return read_evaluation_text(None, read_tokenizer(base), vocab_size, **size)


def subject(base: Path, folders: dict[str, Path], **options: Any) -> Subject:
    checkpoint = open_checkpoint(base)
    shapes = targets(checkpoint.config)
    adapters = {name: read_adapter(path, shapes) for name, path in folders.items()}
    inventory = take_inventory(checkpoint, adapters)
    plan = make_plan(checkpoint.config, ExportOptions(**options), inventory)
    return subject_of(checkpoint, plan, adapters)


def walked(base: Path, folders: dict[str, Path], **options: Any) -> Walk:
    found = subject(base, folders, **options)
    walk = Walk(found, read_text(base), found.variants())
    walk.run()
    return walk


def logits(walk: Walk, variant: Variant) -> list[NDArray[np.float32]]:
    """Of each window."""
    windows, positions = walk.text.windows.shape
    tokens = np.arange(windows * positions).reshape(windows, positions)
    return [walk.logits(variant, window) for window in tokens]


def assert_like(walk: Walk, variant: Variant, model: torch.nn.Module) -> None:
    for ids, ours in zip(walk.text.windows, logits(walk, variant), strict=True):
        oracle.assert_close(ours, oracle.logits(model, ids.tolist()), SHARE)


@pytest.mark.parametrize("kind", KINDS)
def test_float_model_is_that_of_transformers_and_peft(
    base: Path, kind: str, tmp_path: Path
) -> None:
    adapter = make_adapter(base, tmp_path / kind, **KINDS[kind])
    walk = walked(base, {"a": adapter})
    plain = oracle.float_model(base)
    assert_like(walk, Variant(None, "float"), plain)
    assert_like(walk, Variant("a", "float"), with_adapter(plain, adapter))


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_models_are_those_of_bundles(base: Path, kind: str, tmp_path: Path) -> None:
    """Each computed by the runtime in float."""
    folders = {"a": make_adapter(base, tmp_path / kind, **KINDS[kind])}
    walk = walked(base, folders)
    bundles: dict[str, dict[str, Any]] = {
        "side": {},
        "merged": {"mode": "merge"},
        "merged_nf4": {"mode": "merge", "merge_base": "nf4"},
    }
    for name, options in bundles.items():
        bundle = tmp_path / name
        edgelora.export(base, bundle, adapters=folders, report=False, **options)
        with edgelora.load(bundle, accuracy="float") as model:
            adapter = "a" if name == "side" else None
            computed = [model.logits(ids.tolist(), adapter=adapter) for ids in walk.text.windows]
        for ours, theirs in zip(logits(walk, Variant("a", name)), computed, strict=True):  # type: ignore[arg-type]
            oracle.assert_close(ours, theirs, SHARE)


def test_merging_into_the_nf4_base_uses_bitsandbytes_weights(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj"])
    options = {"adapters": {"a": adapter}, "mode": "merge", "format": "float", "report": False}
    edgelora.export(base, tmp_path / "bundle", merge_base="nf4", **options)
    model = oracle.float_model(base)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = bitsandbytes_nf4(module.weight.data)
    merged = with_adapter(model, adapter).merge_and_unload()
    wanted = dict(merged.named_modules())
    for name, weights in oracle.BundleWeights(tmp_path / "bundle").matrices():
        theirs = wanted[name].weight.detach().numpy()  # type: ignore[union-attr]
        np.testing.assert_allclose(weights, theirs, rtol=1e-6, atol=1e-6, err_msg=name)


def bitsandbytes_nf4(weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return oracle.dequantize_4bit(packed, state)


def test_scores_are_the_divergences_from_the_float_model(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    folders = {"a": make_adapter(base, tmp_path / "a", target_modules="all-linear")}
    found = subject(base, folders)
    text = read_text(base)
    walk = Walk(found, text, found.variants())
    evaluation = evaluate(walk)
    part = slice(text.first_scored, text.windows.shape[1] - 1)

    def scored(variant: Variant) -> torch.Tensor:
        rows = np.concatenate([each[part] for each in logits(walk, variant)])
        return torch.log_softmax(torch.tensor(rows, dtype=torch.float64), -1)

    next_ids = torch.tensor(text.windows[:, text.first_scored + 1 :].ravel())
    for result in evaluation.results:
        theirs, ours = scored(Variant(result.variant.adapter, "float")), scored(result.variant)
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        same = (theirs.argmax(-1) == ours.argmax(-1)).double().mean()
        likelihood = ours.gather(1, next_ids[:, None]).mean()
        assert result.score.mean_kl == pytest.approx(float(kl.mean()), abs=1e-9)
        assert result.score.kl_99_percent == pytest.approx(np.percentile(kl, 99), abs=1e-9)
        assert result.score.same_top_token == pytest.approx(float(same))
        assert result.score.perplexity == pytest.approx(float(torch.exp(-likelihood)))
    adapted, plain = scored(Variant("a", "float")), scored(Variant(None, "float"))
    effect = (adapted.exp() * (adapted - plain)).sum(-1).mean()
    assert evaluation.effects["a"].mean_kl == pytest.approx(float(effect))
    assert text.tokens_scored == len(next_ids)


def test_a_long_text_is_scored_in_portions_with_the_same_result(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    found = subject(base, {})
    text = read_text(base, windows=12, positions=100)
    whole = {
        each.variant: each.score for each in evaluate(Walk(found, text, found.variants())).results
    }
    halves = [EvaluationText(part, text.name, text.sha256) for part in np.split(text.windows, 2)]
    parts = [evaluate(Walk(found, half, found.variants())).results for half in halves]
    for first, second in zip(*parts, strict=True):
        mean = (first.score.mean_kl + second.score.mean_kl) / 2
        assert whole[first.variant].mean_kl == pytest.approx(mean)


def test_linears_have_the_error_of_their_output(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    walk = walked(base, {})
    target = "model.layers.0.self_attn.q_proj"
    found = walk.linears[Variant(None, "side")][target]
    weight = tiny.float_values(base)[f"{target}.weight"]
    rounded = dequantize(quantize_int4(weight, 32, zero_points=False))
    model = oracle.float_model(base)
    inputs: list[torch.Tensor] = []
    module = model.get_submodule(target)
    module.register_forward_hook(lambda _, args, out: inputs.append(args[0][0]))
    for ids in walk.text.windows:
        oracle.logits(model, ids.tolist())
    x = torch.cat(inputs).detach().numpy()
    error = np.linalg.norm(x @ (rounded - weight).T) / np.linalg.norm(x @ weight.T)
    assert found.error == pytest.approx(error, rel=1e-3)
    assert found.survival is None


def test_survival_counts_moved_codes_and_compares_deltas() -> None:
    scales = np.ones((1, 1), np.float16)
    codes = np.full((1, 32), 8, np.uint8)
    moved = codes.copy()
    moved[0, :4] += 1
    base, merged = Int4Matrix(codes, scales, 32), Int4Matrix(moved, scales, 32)
    wanted = np.zeros((1, 32), np.float32)
    wanted[0, :4] = 0.25
    found = survival(base, merged, wanted)
    assert found.changed == 4 / 32 and found.correlation == pytest.approx(1)
    wanted[0, 4:8] = 0.25  # half of it was lost
    assert survival(base, merged, wanted).correlation == pytest.approx(np.sqrt(0.5))
    assert survival(base, base, wanted).correlation == 0
    assert survival(base, base, 0 * wanted).correlation == 1


def test_tally_gives_zero_for_the_same_logits() -> None:
    values = np.random.default_rng(1).normal(size=(70, 50)).astype(np.float32)
    tally = Tally()
    tally.add(values, values, np.zeros(70, np.int64))
    score = tally.score()
    assert (score.mean_kl, score.kl_99_percent, score.same_top_token) == (0, 0, 1)


def test_text_too_short_or_not_utf8_is_refused(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    files = {"short.txt": b"too short", "latin.txt": b"caf\xe9 " * 99}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(EdgeLoraError, match=r"short\.txt: .* an evaluation needs 16"):
        edgelora.export(base, tmp_path / "b", report_text=tmp_path / "short.txt")
    with pytest.raises(EdgeLoraError, match=r"latin\.txt: not UTF-8 at byte 3"):
        edgelora.export(base, tmp_path / "b", report_text=tmp_path / "latin.txt")
    assert not (tmp_path / "b").exists()
