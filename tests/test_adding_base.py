"""add-adapter with the base: what needs it is bound, and the report tells of the adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelora
import tiny
from edgelora.adding import add_adapter
from edgelora.errors import EdgeLoraError
from edgelora.manifest import read_manifest, report_paths
from edgelora.report import read_report
from edgelora.verify import verify
from killing import kill_at_every_step
from ledger_adapters import make
from test_cli import edgelora as command
from test_cli import ok
from test_float_oracle import TOKENS, make_adapter

NEED_THE_BASE = ("dora", "bias_all", "ia3", "prompt", "p_tuning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_qwen2(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {kind: make(kind, base, place / kind) for kind in (*NEED_THE_BASE, "plain", "head")}


@pytest.fixture(scope="module")
def exported(
    base: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    edgelora.export(base, out, adapters={"a": folders["plain"]})
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def report(bundle: Path) -> dict[str, Any]:
    paths = report_paths(read_manifest(bundle))
    found: dict[str, Any] = json.loads((bundle / paths["json"]).read_text())
    return found


def without_means(variant: dict[str, Any]) -> dict[str, Any]:
    """But for those of figures that were rounded already."""
    return {key: each for key, each in variant.items() if not key.startswith("delta_")}


def told(bundle: Path, adapter: str) -> list[dict[str, Any]]:
    return [each for each in report(bundle)["variants"] if each["adapter"] == adapter]


def html(bundle: Path) -> str:
    return (bundle / report_paths(read_manifest(bundle))["html"]).read_text()


@pytest.mark.parametrize("kind", NEED_THE_BASE)
def test_what_needs_the_base_is_bound_as_an_export_does(
    kind: str, base: Path, folders: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(EdgeLoraError, match="--base"):
        add_adapter(bundle, "n", folders[kind])
    entry = add_adapter(bundle, "n", folders[kind], base=base).entry
    adapters = {"a": folders["plain"], "n": folders[kind]}
    edgelora.export(base, tmp_path / "both", adapters=adapters, report=False)
    both = read_manifest(tmp_path / "both")["adapters"]["n"]
    assert (tmp_path / "both" / both["path"]).read_bytes() == (bundle / entry["path"]).read_bytes()
    assert any(check.what == "adapter n in int8" for check in verify(bundle))
    with edgelora.load(bundle) as model:
        assert not np.array_equal(model.logits(TOKENS, adapter="n"), model.logits(TOKENS))


@pytest.mark.parametrize("kind", ["head", "dora", "prompt"])
def test_the_report_is_that_of_an_export_with_both(
    kind: str, base: Path, folders: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    before = report(bundle)
    added = add_adapter(bundle, "n", folders[kind], base=base)
    edgelora.export(base, tmp_path / "both", adapters={"a": folders["plain"], "n": folders[kind]})
    found, both = report(bundle), report(tmp_path / "both")
    assert found.keys() == both.keys()
    for ours, theirs in zip(found["variants"], before["variants"], strict=False):
        assert without_means(ours) == without_means(theirs)
        for mean in ("delta_changed", "delta_correlation"):
            assert (ours[mean] or 0) == pytest.approx(theirs[mean] or 0, rel=1e-3)
    for ours, theirs in zip(found["variants"], both["variants"], strict=True):
        assert (ours["adapter"], ours["kind"], ours["exported"]) == (
            theirs["adapter"],
            theirs["kind"],
            theirs["exported"],
        )
        assert ours["linears"].keys() == theirs["linears"].keys()
        for figure in ("mean_kl", "perplexity", "same_top_token"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=2e-3, abs=1e-5)
        assert (ours["weight_bytes"], ours["adapter_bytes"]) == (
            theirs["weight_bytes"],
            theirs["adapter_bytes"],
        )
    assert added.mean_kl == pytest.approx(
        next(v["mean_kl"] for v in both["variants"] if (v["adapter"], v["kind"]) == ("n", "side")),
        rel=2e-3,
    )
    for text in (html(bundle), html(tmp_path / "both")):
        assert '<td colspan="8">n</td>' in text and '<td colspan="8">a</td>' in text
    assert not (bundle / "report.json").exists() and not (bundle / "report.html").exists()
    assert not [check for check in verify(bundle) if check.what == "report"]


def test_without_the_base_it_is_said_whom_the_report_leaves_out(
    base: Path, folders: dict[str, Path], bundle: Path
) -> None:
    said = ok("add-adapter", bundle, f"n={folders['head']}")
    assert "the report tells nothing of n: --base BASE --force measures it" in said
    assert "tells nothing of n, added without the base" in ok("verify", bundle)
    assert "Not measured: n, added without the base" in html(bundle)
    assert len(told(bundle, "a")) == 4 and report(bundle)["left_out"] == ["n"]
    add_adapter(bundle, "a", folders["head"], force=True)
    assert "tells nothing of a, n, added" in ok("verify", bundle)
    assert "Not measured: n, a, added" in html(bundle) and '<td colspan="8">a</td>' not in html(
        bundle
    )
    assert not told(bundle, "a") and {*report(bundle)["effects"]} == set()
    for name, left in {"n": ["a"], "a": []}.items():
        said = ok("add-adapter", bundle, f"{name}={folders['head']}", "--base", base, "--force")
        assert "mean KL from the float model: 0." in said and "nothing" not in said
        assert report(bundle)["left_out"] == left
        assert len(told(bundle, name)) == 4 and f'<td colspan="8">{name}</td>' in html(bundle)
    assert "tells nothing" not in ok("verify", bundle)
    assert "Not measured" not in html(bundle)


def test_a_damaged_report_is_named(folders: dict[str, Path], bundle: Path) -> None:
    (bundle / "report.json").write_text("{}")
    with pytest.raises(EdgeLoraError, match=r"report\.json"):
        add_adapter(bundle, "n", folders["head"])
    with pytest.raises(EdgeLoraError, match=r"report\.json: cannot be read .'format'.: export"):
        read_report(bundle / "report.json")
    (bundle / "report.json").write_text('{"format": "edgelora-report", "format_version": 2}')
    with pytest.raises(EdgeLoraError, match="not a report of this version: export the bundle"):
        read_report(bundle / "report.json")


def test_a_bundle_without_a_report_gets_none(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    edgelora.export(base, tmp_path / "plain", report=False)
    added = add_adapter(tmp_path / "plain", "n", folders["dora"], base=base)
    assert added.mean_kl is None and "report" not in added.entry
    assert not list((tmp_path / "plain").glob("report*"))


def test_another_base_or_text_is_refused_and_the_bundle_stays(
    base: Path, folders: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    before = (bundle / "manifest.json").read_bytes()
    text = tmp_path / "text.txt"
    text.write_text("some words of another text " * 200)
    other = tiny.tiny_qwen2(tmp_path / "other", seed=1)
    with pytest.raises(EdgeLoraError, match="give that base"):
        add_adapter(bundle, "n", folders["head"], base=other)
    with pytest.raises(EdgeLoraError, match="was measured on the text built-in, not on"):
        add_adapter(bundle, "n", folders["head"], base=base, report_text=text)
    with pytest.raises(EdgeLoraError, match="is bound already"):
        add_adapter(bundle, "n", bundle / "adapters" / "a", base=base)
    with pytest.raises(EdgeLoraError, match="biases that the base does not have"):
        llama = tiny.tiny_llama(tmp_path / "llama")
        edgelora.export(llama, tmp_path / "l", report=False)
        add_adapter(tmp_path / "l", "n", folders["bias_all"], base=llama)
    done = command("add-adapter", bundle, f"n={folders['head']}", "--report-text", text)
    assert done.returncode == 2 and "needs --base" in done.stderr
    assert (bundle / "manifest.json").read_bytes() == before
    edgelora.export(base, tmp_path / "b", report_text=text)
    with pytest.raises(EdgeLoraError, match=r"on the text text\.txt, not on built-in"):
        add_adapter(tmp_path / "b", "n", folders["head"], base=base)
    add_adapter(tmp_path / "b", "n", folders["head"], base=base, report_text=text)


def test_kill_at_any_step_leaves_report_and_adapters_of_one_bundle(
    base: Path, bundle: Path, tmp_path: Path
) -> None:
    new = make_adapter(base, tmp_path / "new", target_modules=["v_proj"])
    definitions = """
out, new, base = map(Path, sys.argv[1:])
def call():
    adding.add_adapter(out, "b", new, force=True, base=base)
def check():
    import json
    from edgelora.manifest import report_paths
    manifest = read_manifest(out)
    paths = report_paths(manifest)
    found = json.loads((out / paths["json"]).read_text())
    told = {each["adapter"] for each in found["variants"]}
    assert told == {None, *manifest["adapters"]}, told
    text = (out / paths["html"]).read_text()
    assert ('<td colspan="8">b</td>' in text) == ("b" in told)
"""
    assert kill_at_every_step(definitions, bundle, new, base) >= 8
