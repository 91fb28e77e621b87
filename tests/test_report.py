"""report.json and report.html say what a bundle loses; mode auto and merge base auto go by it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import edgelora
import tiny
from calling import Call
from edgelora.errors import EdgeLoraError
from edgelora.manifest import read_manifest
from test_float_oracle import make_adapter

FIGURES = {"mean_kl", "kl_99_percent", "same_top_token", "perplexity"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), target_modules="all-linear")


@pytest.fixture(scope="module")
def faint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is lost in 4 bits."""
    folder = tmp_path_factory.mktemp("faint")
    return make_adapter(base, folder, target_modules="all-linear", lora_alpha=0.002)


def report(bundle: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((bundle / "report.json").read_text())
    return read


def variant(found: dict[str, Any], adapter: str | None, kind: str) -> dict[str, Any]:
    (one,) = [v for v in found["variants"] if (v["adapter"], v["kind"]) == (adapter, kind)]
    return dict(one)


def test_every_export_has_a_report_of_all_variants(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    edgelora.export(base, tmp_path / "b", adapters={"a": adapter, "b": adapter})
    found = report(tmp_path / "b")
    names = {(each["adapter"], each["kind"]) for each in found["variants"]}
    kinds = ("float", "side", "merged", "merged_nf4")
    assert names == {(None, "float"), (None, "side"), *((n, k) for n in "ab" for k in kinds)}
    exported = {(v["adapter"], v["kind"]) for v in found["variants"] if v["exported"]}
    assert exported == {(None, "side"), ("a", "side"), ("b", "side")}
    assert variant(found, "a", "side") | {"adapter": "b"} == variant(found, "b", "side")
    for each in found["variants"]:
        assert each.keys() >= FIGURES
        assert (each["mean_kl"] == 0) == (each["kind"] == "float")
    assert set(found["effects"]) == {"a", "b"}
    files = read_manifest(tmp_path / "b")["files"]
    assert {"report.json", "report.html"} <= files.keys()


def test_sizes_in_the_report_are_those_of_the_files(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    edgelora.export(base, tmp_path / "side", adapters={"a": adapter})
    edgelora.export(base, tmp_path / "merged", adapters={"a": adapter}, mode="merge")
    side, merged = report(tmp_path / "side"), report(tmp_path / "merged")
    for found in (side, merged):
        assert variant(found, "a", "merged")["adapter_bytes"] == 0
    for kind in ("side", "merged"):
        assert (
            variant(side, "a", kind)["weight_bytes"] == variant(merged, "a", kind)["weight_bytes"]
        )
    file = tmp_path / "side" / "adapters" / "a" / "adapter.safetensors"
    assert 0 <= file.stat().st_size - variant(side, "a", "side")["adapter_bytes"] < 8192


def test_the_bundle_s_own_weights_are_measured(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Compensated ones lose less than the plainly rounded ones beside them."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.TEXT * 200))
    options: dict[str, Any] = {"quality": "balanced", "calibration": text, "report_text": text}
    edgelora.export(base, tmp_path / "fast", report_text=text, embedding_format="int4")
    edgelora.export(base, tmp_path / "balanced", **options)
    fast, balanced = (variant(report(tmp_path / n), None, "side") for n in ("fast", "balanced"))
    assert balanced["mean_kl"] < 0.7 * fast["mean_kl"]
    merged = {"adapters": {"a": adapter}, "mode": "merge"}
    edgelora.export(base, tmp_path / "merged", **options, **merged)
    found = report(tmp_path / "merged")
    assert variant(found, "a", "merged")["exported"]
    assert variant(found, "a", "merged")["mean_kl"] < variant(found, "a", "merged_nf4")["mean_kl"]


@pytest.mark.parametrize("flavor", ["edgelora", "ort"])
@pytest.mark.parametrize("options", [{}, {"zero_points": True}, {"block_size": 64}])
def test_weights_read_back_lose_what_their_rounding_loses(
    base: Path, flavor: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The base is measured with the bundle's bytes, "merged" of an adapter of zeros is not."""
    zeros = make_adapter(base, tmp_path / "zeros", target_modules="all-linear", lora_alpha=1e-30)
    edgelora.export(base, tmp_path / "b", adapters={"a": zeros}, flavor=flavor, **options)
    found = report(tmp_path / "b")
    stored, plain = variant(found, None, "side"), variant(found, "a", "merged")
    assert stored["mean_kl"] == pytest.approx(plain["mean_kl"], rel=1e-3) and plain["mean_kl"] > 0


def test_page_stands_alone_and_shows_every_adapter(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    edgelora.export(base, tmp_path / "b", adapters={"ab": adapter})
    page = (tmp_path / "b" / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "<script" not in page
    loaded = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert all(each.startswith(("#", "data:image/png;base64,")) for each in loaded), loaded
    assert "@import" not in page and "url(http" not in page
    assert page.count("<svg") == 3  # bars, what merging leaves, where it loses
    found = variant(report(tmp_path / "b"), "ab", "side")
    assert f"{found['mean_kl']:.3f}" in page and 'class="exported"' in page


def test_an_adapter_that_merging_loses_is_warned_of(
    base: Path, faint: Path, adapter: Path, tmp_path: Path
) -> None:
    lost = edgelora.export(base, tmp_path / "lost", adapters={"a": faint}, mode="merge")
    (warning,) = lost.warnings
    assert "adapter a: little of it is left after merging" in warning
    assert report(tmp_path / "lost")["warnings"] == list(lost.warnings)
    assert "little of it is left" in (tmp_path / "lost" / "report.html").read_text()
    kept = edgelora.export(base, tmp_path / "kept", adapters={"a": adapter}, mode="merge")
    assert kept.warnings == ()
    beside = edgelora.export(base, tmp_path / "beside", adapters={"a": faint})
    assert beside.warnings == ()


def test_merging_without_a_report_is_not_silent(
    base: Path, faint: Path, adapter: Path, tmp_path: Path
) -> None:
    """Measured for a choice it says what is lost, otherwise that nothing was measured."""
    options: dict[str, Any] = {"mode": "merge", "report": False}
    lost, kept = ({"adapters": {"a": each}} for each in (faint, adapter))
    (said,) = edgelora.export(base, tmp_path / "1", **lost, **options).warnings
    assert "adapter a: merged, and without a report it is not measured" in said
    (said,) = edgelora.export(base, tmp_path / "2", **lost, **options, merge_base="auto").warnings
    assert "adapter a: little of it is left after merging" in said
    for silent in (kept | {"merge_base": "auto"}, lost | {"format": "float"}):
        done = edgelora.export(base, tmp_path / "3", force=True, **silent, **options)
        assert done.warnings == ()


def test_merging_does_not_need_factors_that_float16_can_hold(base: Path, tmp_path: Path) -> None:
    """A side branch in float16 does, and its refusal names the adapter."""
    folder = make_adapter(base, tmp_path / "a", target_modules=["q_proj"], lora_alpha=12 * 2.0**80)
    file = folder / "adapter_model.safetensors"
    save_file({name: values * 2.0**-40 for name, values in load_file(file).items()}, file)
    merged = edgelora.export(base, tmp_path / "b", adapters={"a": folder}, mode="merge")
    assert merged.plan.mode == "merge"
    with pytest.raises(EdgeLoraError, match=r"adapter a: model.*q_proj.lora_.: .* float16"):
        edgelora.export(base, tmp_path / "c", adapters={"a": folder})


def test_mode_auto_merges_only_what_merging_keeps(
    base: Path, faint: Path, adapter: Path, tmp_path: Path
) -> None:
    lost = edgelora.export(base, tmp_path / "a", adapters={"a": faint}, mode="auto")
    assert (lost.plan.mode, lost.plan.merge_base) == ("side", None)
    assert "little of it is left" in lost.plan.reasons["mode"]
    some = make_adapter(base, tmp_path / "some", target_modules="all-linear", lora_alpha=1)
    clear = edgelora.export(base, tmp_path / "d", adapters={"a": some}, mode="auto")
    assert clear.plan.mode == "side" and "more than a tenth" in clear.plan.reasons["mode"]
    kept = edgelora.export(
        base, tmp_path / "b", adapters={"a": adapter}, mode="auto", format="float"
    )
    assert (kept.plan.mode, kept.plan.merge_base) == ("merge", "float")
    assert "at most a tenth" in kept.plan.reasons["mode"]
    two = {"a": adapter, "b": adapter}
    both = edgelora.export(base, tmp_path / "c", adapters=two, mode="auto", report=False)
    assert both.plan.mode == "side" and "only exactly one" in both.plan.reasons["mode"]


def test_what_only_merging_can_apply_is_merged_and_measured(
    call: Call, base: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    folder = make_adapter(base, tmp_path / "a", **settings)
    options: dict[str, Any] = {"adapters": {"a": folder}, "format": "float"}
    found = edgelora.export(base, tmp_path / "b", mode="auto", **options)
    assert found.plan.mode == "merge" and "only merging" in found.plan.reasons["mode"]
    assert variant(report(tmp_path / "b"), "a", "merged")["mean_kl"] < 1e-6
    said = call("eval", tmp_path / "b", "--base", base, "--adapter", f"a={folder}", "--json")
    (score,) = json.loads(said.out)["scores"]
    assert score["score"]["mean_kl"] < 1e-6


def test_merge_base_auto_takes_the_lower_perplexity(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"adapters": {"a": adapter}, "mode": "merge"}
    found = edgelora.export(base, tmp_path / "b", merge_base="auto", **options)
    both = {k: variant(report(tmp_path / "b"), "a", k) for k in ("merged", "merged_nf4")}
    best = min(both, key=lambda kind: both[kind]["perplexity"])
    assert found.plan.merge_base == {"merged": "float", "merged_nf4": "nf4"}[best]
    assert both[best]["exported"] and "perplexity" in found.plan.reasons["merge_base"]


def test_without_a_report_nothing_is_measured(base: Path, adapter: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "b", adapters={"a": adapter}, report=False)
    assert not (tmp_path / "b" / "report.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"merge_base": "nf4"}, "in mode side nothing is merged"),
        ({"merge_base": "int4", "mode": "merge"}, "one of float, nf4, auto"),
        ({"report": False, "report_text": "x.txt"}, "no report was asked for"),
        ({"report_text": "no/such.txt"}, "no/such.txt"),
    ],
)
def test_options_that_contradict_are_refused(
    base: Path, adapter: Path, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(EdgeLoraError, match=re.escape(said)):
        edgelora.export(base, tmp_path / "b", adapters={"a": adapter}, **options)
    assert not (tmp_path / "b").exists()


def test_eval_compares_a_bundle_with_its_base(
    call: Call,
    base: Path,
    adapter: Path,
    tmp_path: Path,
) -> None:
    edgelora.export(base, tmp_path / "b", adapters={"a": adapter}, format="float", report=False)
    said = call("eval", tmp_path / "b", "--base", base, "--windows", 2, "--json")
    assert said.code == 0, said
    scores = {each["adapter"]: each for each in json.loads(said.out)["scores"]}
    assert set(scores) == {None, "a"}
    for each in scores.values():
        assert each["score"]["mean_kl"] < 1e-6
        assert each["perplexity"] == pytest.approx(each["float_perplexity"], rel=1e-4)
    assert scores[None]["perplexity"] != pytest.approx(scores["a"]["perplexity"], rel=1e-3)


def test_eval_without_a_base_gives_perplexity_and_says_what_is_missing(
    call: Call,
    base: Path,
    tmp_path: Path,
) -> None:
    edgelora.export(base, tmp_path / "b", report=False)
    said = call("eval", tmp_path / "b")
    assert said.code == 0 and "--base" in said.err
    assert re.search(r"^\(base\) +– +– +– +\d+\.\d+ +–$", said.out, re.MULTILINE), said.out


@pytest.mark.parametrize("use_dora", [False, True])
def test_eval_of_merged_adapters_takes_their_folder(
    call: Call,
    fails: Any,
    base: Path,
    tmp_path: Path,
    *,
    use_dora: bool,
) -> None:
    folder = make_adapter(base, tmp_path / "a", target_modules="all-linear", use_dora=use_dora)
    other = make_adapter(base, tmp_path / "o", target_modules=["q_proj"])
    options: dict[str, Any] = {"mode": "merge", "format": "float", "report": False}
    edgelora.export(base, tmp_path / "b", adapters={"a": folder}, **options)
    start = ("eval", tmp_path / "b", "--base", base)
    said = call(*start, "--adapter", f"a={folder}", "--json")
    (score,) = json.loads(said.out)["scores"]
    assert score["score"]["mean_kl"] < 1e-6
    assert "--adapter a=PATH" in fails(*start)
    assert "its fingerprint is sha256:" in fails(*start, "--adapter", f"a={other}")
    assert "no adapter 'x' (it has: a)" in fails(*start, "--adapter", f"x={other}")


def test_eval_refuses_another_base(fails: Any, base: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "b", report=False)
    sibling = tiny.tiny_llama(tmp_path / "sibling", seed=1)
    said = fails("eval", tmp_path / "b", "--base", sibling)
    assert len(set(re.findall(r"sha256:[0-9a-f]{64}", said))) == 2
    assert "is compared only with --base" in fails("eval", tmp_path / "b", "--adapter", "a=x")
