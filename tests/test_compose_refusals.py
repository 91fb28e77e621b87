"""compose as a user meets it: what is refused, in one line; what is printed and written."""

import errno
import io
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from click.shell_completion import ShellComplete
from rich.console import Console

import edgelora
import test_cli
import tiny
from edgelora import EdgeLoraError
from edgelora.adapter.tensors import safetensors_bytes
from edgelora.cli import cli, main, progress
from edgelora.cli.parameters import WeightedPath
from test_cli import WITHOUT_CONVERTER, fails, ok
from test_float_oracle import make_adapter

LAYER = "model.layers.0.self_attn"
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def make_folder(path: Path, *names: str, rank: int = 2, rows: int = 6, **config: Any) -> Path:
    """A PEFT folder by hand; `names` are linears of layer 0, 6 × 8 unless `rows` says otherwise."""
    path.mkdir()
    random = np.random.default_rng(rank * rows + len(names))
    tensors = {}
    for name in names:
        ranks = config.get("rank_pattern", {})
        shape = ranks.get(name, rank), 8
        prefix = f"base_model.model.{LAYER}.{name}"
        tensors[f"{prefix}.lora_A.weight"] = random.standard_normal(shape, dtype=np.float32)
        lora_b = random.standard_normal((rows, shape[0]), dtype=np.float32)
        tensors[f"{prefix}.lora_B.weight"] = lora_b
        if config.get("use_dora"):
            tensors[f"{prefix}.lora_magnitude_vector"] = np.ones(rows, dtype=np.float32)
        if config.get("lora_bias"):
            tensors[f"{prefix}.lora_B.bias"] = np.ones(rows, dtype=np.float32)
        if config.get("bias", "none") != "none":
            tensors[f"{prefix}.base_layer.bias"] = np.ones(rows, dtype=np.float32)
    (path / FILES[1]).write_bytes(safetensors_bytes(tensors, {}))
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": list(names)}
    (path / FILES[0]).write_text(json.dumps({**fields, **config}))
    return path


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "one", "q_proj", "v_proj", base_model_name_or_path="team/base")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "two", "v_proj", base_model_name_or_path="/home/me/Base/")


def config_of(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / FILES[0]).read_text())
    return fields


def refused(adapters: dict[Path, Any], out: Path, **options: Any) -> str:
    """The one line; nothing was made, beside it neither."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(EdgeLoraError) as caught:
        edgelora.compose(adapters, out, **options)
    assert sorted(out.parent.iterdir()) == before
    line = str(caught.value)
    assert "\n" not in line
    return line


# ---- adapters that cannot be composed ----


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_dora": True}, "DoRA scales the rows of 1 base weights"),
        ({"bias": "lora_only"}, "1 biases take the place of the base's"),
        ({"lora_bias": True}, "lora_B has a bias in 1 targets"),
    ],
)
def test_what_is_no_factor_is_refused_with_the_way_out(
    one: Path, tmp_path: Path, config: dict[str, Any], what: str
) -> None:
    """PEFT drops it without a word."""
    bad = make_folder(tmp_path / "bad", "q_proj", **config)
    assert refused({one: 1, bad: 1}, tmp_path / "out") == (
        f"{bad}: {what}: a sum of factors leaves that out: weigh it at run time (--adapter)"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: lm_head"),
        ({"trainable_token_indices": [3, 4]}, r"trainable_token_indices: model\.embed_tokens"),
    ],
)
def test_replaced_tensors_are_refused(
    one: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    saved = make_adapter(base, tmp_path / "saved", target_modules=["q_proj"], **settings)
    line = refused({saved: 1, one: 1}, tmp_path / "out")
    assert re.match(rf"{saved}: {words}.* cannot be replaced beside the base: export a bund", line)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save 'lm_head': the file has nothing of it"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: the file has nothing of it"),
        ({"target_parameters": ["experts"]}, "no supported base has other matrices"),
        ({"init_lora_weights": "pissa"}, "made another base"),
        ({"peft_type": "LOHA"}, "LoHa is not supported"),
    ],
)
def test_what_export_refuses_is_refused(
    one: Path, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    bad = make_folder(tmp_path / "bad", "q_proj", **config)
    line = refused({one: 1, bad: 1}, tmp_path / "out")
    assert line.startswith(f"{bad}: ") and words in line


@pytest.mark.parametrize(
    ("method", "way_out"),
    [
        ("linear", "cat or svd"),
        ("ties", "cat or ties_svd"),
        ("dare_linear", "cat or dare_linear_svd"),
        ("magnitude_prune", "cat or magnitude_prune_svd"),
    ],
)
def test_different_ranks_are_refused_where_factors_are_added(
    one: Path, tmp_path: Path, method: str, way_out: str
) -> None:
    other = make_folder(tmp_path / "other", "q_proj", rank=3)
    options = {} if method == "linear" else {"density": 0.5}
    line = refused({one: 1, other: 1}, tmp_path / "out", method=method, **options)
    ranks = f"{one} has 2, {other} has 3"
    assert line == f"method {method} needs one rank, but {ranks}: use {way_out}"


def test_different_ranks_of_one_target_are_refused(one: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", "q_proj", "v_proj", rank_pattern={"q_proj": 1})
    line = refused({one: 1, other: 1}, tmp_path / "out", method="linear")
    assert line == (
        f"method linear needs one rank of {LAYER}.q_proj, but {one} has 2, {other} has 1: "
        "use cat or svd"
    )


def test_regex_and_names_are_refused_together(one: Path, tmp_path: Path) -> None:
    regex = make_folder(tmp_path / "regex", "q_proj", target_modules=".*q_proj")
    line = refused({one: 1, regex: 1}, tmp_path / "out")
    assert line.startswith(f"{regex}: target_modules is a regex") and "as a list into" in line
    everything = make_folder(tmp_path / "all", "q_proj", target_modules="all-linear")
    edgelora.compose({one: 1, everything: 1}, tmp_path / "out")


def test_other_size_is_another_base(one: Path, tmp_path: Path) -> None:
    wide = make_folder(tmp_path / "wide", "q_proj", rows=7)
    assert refused({one: 1, wide: 1}, tmp_path / "out") == (
        f"{wide}: {LAYER}.q_proj is 7 × 8, in {one} 6 × 8: adapters of different bases cannot be "
        "composed"
    )


def test_same_folder_twice_is_refused(one: Path, tmp_path: Path) -> None:
    again = tmp_path / "two" / ".." / "one"
    (tmp_path / "two").mkdir()
    line = refused({one: 0.5, again: 0.5}, tmp_path / "out")
    assert line == f"{again}: the folder {one} again: give it once, weights added"


def test_no_adapters_and_no_folder_are_refused(tmp_path: Path) -> None:
    assert refused({}, tmp_path / "out").startswith("no adapters to compose")
    gone = tmp_path / "gone"
    assert refused({gone: 1}, tmp_path / "out").startswith(f"{gone}: no such folder")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "0.5", True, None])
def test_weight_that_is_no_number_is_refused(one: Path, tmp_path: Path, weight: object) -> None:
    line = refused({one: weight}, tmp_path / "out")
    assert line == f"{one}: the weight {weight!r} is not a finite number"


def test_values_beyond_float32_are_refused(one: Path, two: Path, tmp_path: Path) -> None:
    assert "does not fit float32" in refused({one: 1e39}, tmp_path / "out")
    big = make_folder(tmp_path / "big", "v_proj", lora_alpha=1e37)
    for method, weight in (("cat", 1e30), ("svd", 1e30), ("ties_svd", 1e30)):
        options = {"density": 0.5} if method == "ties_svd" else {}
        line = refused({one: 1, big: weight}, tmp_path / "out", method=method, **options)
        assert line == (
            f"{one}, {big}: the sum of {LAYER}.v_proj does not fit float32: choose smaller weights"
        )


def test_nan_in_an_adapter_is_refused(one: Path, tmp_path: Path) -> None:
    file = one / FILES[1]
    tensors = safetensors.numpy.load_file(file)
    tensors[f"base_model.model.{LAYER}.v_proj.lora_B.weight"][0, 0] = np.nan
    file.write_bytes(safetensors_bytes(tensors, {}))
    line = refused({one: 1}, tmp_path / "out")
    assert line == f"{one}: base_model.model.{LAYER}.v_proj.lora_B.weight: holds NaN or infinity"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"method": "best"}, "method 'best': one of linear, cat, svd, ties, "),
        ({"method": "cat", "rank": 4}, "rank 4 with method cat: only for svd and …_svd"),
        ({"method": "svd", "density": 0.5}, "density 0.5 with method svd: only for ties, dare"),
        ({"method": "ties"}, "method ties: needs --density, the share of the values to keep"),
        ({"method": "ties", "density": 0.0}, "density 0.0: above 0, at most 1"),
        ({"method": "ties", "density": "half"}, "density half: above 0, at most 1"),
        ({"method": "ties", "density": 1.5}, "density 1.5: above 0, at most 1"),
        ({"method": "ties", "density": 0.5, "seed": 1}, "seed 1 with method ties: only for dare"),
        ({"majority_sign": "total"}, "majority sign total with method cat: only for ties"),
        (
            {"method": "ties", "density": 0.5, "majority_sign": "most"},
            "majority sign 'most': one of total, frequency",
        ),
        ({"method": "svd", "rank": 0}, "rank 0: at least 1"),
        ({"method": "svd", "rank": 7}, f"rank 7: {LAYER}.q_proj is 6 × 8: --rank up to 6"),
        ({"method": "dare_linear", "density": 0.5, "seed": -1}, "seed -1: an integer from 0 to"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    one: Path, two: Path, tmp_path: Path, options: dict[str, Any], line: str
) -> None:
    assert refused({one: 1, two: 1}, tmp_path / "out", **options).startswith(line)


# ---- what is written ----


def test_config_names_base_and_whole_targets(one: Path, two: Path, tmp_path: Path) -> None:
    """The two names of the base have their last component in common: the first is kept."""
    report = edgelora.compose({one: 1, two: 1}, tmp_path / "out")
    config = config_of(report.folder)
    assert report.warnings == ()
    assert config["base_model_name_or_path"] == report.base_model_name_or_path == "team/base"
    assert config["target_modules"] == [f"{LAYER}.q_proj", f"{LAYER}.v_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})
    assert sorted(path.name for path in report.folder.iterdir()) == FILES


def test_other_base_is_a_warning(one: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", "q_proj", base_model_name_or_path="team/chat")
    nameless = make_folder(tmp_path / "nameless", "q_proj")
    report = edgelora.compose({nameless: 1, one: 1, other: 1}, tmp_path / "out")
    assert report.warnings == (
        f"{one} was trained on team/base, but {other} on team/chat: team/base is written",
    )
    assert config_of(report.folder)["base_model_name_or_path"] == "team/base"


def test_alphas_in_doubt_are_a_warning(one: Path, tmp_path: Path) -> None:
    alphas = {"0.self_attn.q_proj": 3, "q_proj": 5}
    doubtful = make_folder(tmp_path / "doubtful", "q_proj", alpha_pattern=alphas)
    (warning,) = edgelora.compose({one: 1, doubtful: 1}, tmp_path / "out").warnings
    assert warning.startswith("adapter doubtful: alpha_pattern '0.self_attn.q_proj', 'q_proj': all")


def test_layers_of_the_first_adapter_do_not_limit_the_others(tmp_path: Path) -> None:
    first = make_folder(tmp_path / "first", "q_proj", layers_to_transform=[0])
    second = make_folder(tmp_path / "second", "v_proj", exclude_modules=["q_proj"])
    out = edgelora.compose({first: 1, second: 1}, tmp_path / "out").folder
    assert config_of(out)["target_modules"] == [f"{LAYER}.q_proj", f"{LAYER}.v_proj"]


def test_unknown_modules_with_draws_are_a_warning(tmp_path: Path) -> None:
    strange = [make_folder(tmp_path / name, "qkv") for name in ("x", "y")]
    adapters = dict.fromkeys(strange, 1.0)
    report = edgelora.compose(adapters, tmp_path / "out", method="dare_linear", density=0.5)
    assert report.warnings[0].startswith(f"{LAYER}.qkv: unknown modules, taken in the order")
    assert edgelora.compose(adapters, tmp_path / "cat").warnings == ()


def test_existing_folder_needs_force_and_must_be_a_plain_peft_folder(
    one: Path, two: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert "exists already: choose another folder or pass --force" in refused({one: 1}, out)
    line = refused({one: 1}, out, force=True)
    assert line.endswith("exists and is no PEFT folder: --force replaces PEFT folders only")
    shutil.copytree(one, out, dirs_exist_ok=True)
    (out / "checkpoint-500").mkdir()
    line = refused({one: 1}, out, force=True)
    assert line == f"{out}: --force would delete checkpoint-500 too: choose another folder"
    (out / "checkpoint-500").rmdir()
    edgelora.compose({one: 1, two: 1}, out, force=True)
    assert config_of(out)["r"] == 4


def test_input_may_be_replaced(one: Path, two: Path, tmp_path: Path) -> None:
    edgelora.compose({one: 1, two: 1}, tmp_path / "out")
    edgelora.compose({one: 1, two: 1}, one, force=True)
    for name in FILES:
        assert (one / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("step", [(os, "fsync"), (Path, "mkdir"), (Path, "write_bytes")])
def test_failure_leaves_nothing_or_the_old_folder(
    one: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str]
) -> None:
    def full_disk(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = Path(shutil.copytree(one, tmp_path / "out"))
    before = (out / FILES[0]).read_bytes()
    monkeypatch.setattr(*step, full_disk)
    for folder in (tmp_path / "new", out):
        line = refused({one: 1, two: 1}, folder, force=True)
        assert line.startswith(f"{folder}: no space left on the device")
    assert (out / FILES[0]).read_bytes() == before


# ---- the command ----


def test_command_says_what_it_made(one: Path, two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = test_cli.edgelora("compose", f"{one}:0.6", f"{two}:-0.4", "-o", out, "--method", "svd")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: 2 adapters, svd, rank 2, 2 targets, 0.0 MB\n"
    expected = edgelora.compose({one: 0.6, two: -0.4}, tmp_path / "library", method="svd").folder
    assert (out / FILES[1]).read_bytes() == (expected / FILES[1]).read_bytes()


def test_command_needs_no_extra_but_for_pruning(one: Path, two: Path, tmp_path: Path) -> None:
    for method in ("linear", "cat", "svd"):
        arguments = ("compose", one, two, "--method", method, "-o", tmp_path / method)
        ok(*arguments, program=WITHOUT_CONVERTER)
    arguments = ("compose", one, two, "--method", "ties", "--density", 0.5, "-o", tmp_path / "t")
    line = fails(*arguments, program=WITHOUT_CONVERTER)
    assert line == "error: method ties needs torch: pip install 'edgelora[compose]'\n"
    assert not (tmp_path / "t").exists()


def test_pruning_prints_json_and_nothing_else(one: Path, two: Path, tmp_path: Path) -> None:
    """Not what the packages log that PEFT imports."""
    arguments = ("--method", "dare_ties", "--density", 0.5, "--seed", 3, "--json")
    done = test_cli.edgelora("compose", one, f"{two}:2", "-o", tmp_path / "out", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["adapters"] == {str(one): 1.0, str(two): 2.0}
    assert said["folder"] == str(tmp_path / "out") and said["method"] == "dare_ties"
    assert (said["rank"], said["targets"], said["warnings"]) == (2, 2, [])


def test_warning_goes_to_standard_error(one: Path, tmp_path: Path) -> None:
    done = test_cli.edgelora("compose", one, "-o", tmp_path / "out", "--json")
    assert done.stderr == "warning: one adapter: method linear, as PEFT does\n"
    assert json.loads(done.stdout)["method"] == "linear"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", ("plain", 1.0)),
        ("with:0.25", ("with", 0.25)),
        ("with:-2", ("with", -2.0)),
        ("a:b:1e-1", ("a:b", 0.1)),
        ("there:5", ("there:5", 1.0)),
    ],
)
def test_weight_is_behind_the_last_colon_unless_such_a_folder_exists(
    text: str, expected: tuple[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there:5").mkdir()
    assert WeightedPath().convert(text, None, None) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a:half", "-o", "x"], "'a:half': the weight is not a number"),
        (["a:nan", "-o", "x"], "'a:nan': the weight is not finite"),
        (["a", "a:2", "-o", "x"], "ADAPTER a given twice"),
        ([":1", "-o", "x"], "no path"),
        (["-o", "x"], "Missing argument"),
        (["a"], "Missing option"),
        (["a", "-o", "x", "--method", "mean"], "'mean' is not one of 'linear', 'cat', 'svd'"),
        (["a", "-o", "x", "--density", "0"], "0<x<=1"),
    ],
)
def test_usage_errors(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["edgelora", "compose", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_completion_offers_folders_and_methods() -> None:
    completer = ShellComplete(cli, {}, "edgelora", "_EDGELORA_COMPLETE")
    assert [item.type for item in completer.get_completions(["compose"], "adap")] == ["dir"]
    methods = completer.get_completions(["compose", "x", "--method"], "dare")
    assert [item.value for item in methods] == [
        "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    ]  # fmt: skip


@pytest.mark.parametrize(("patience", "drawn"), [(0.0, True), (1000.0, False)])
def test_bar_appears_late(patience: float, *, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "err", Console(file=screen, force_terminal=True))
    monkeypatch.setattr(progress, "PATIENCE", patience)
    with progress.late_bar("targets") as show:
        show(1, 2)
        until = time.monotonic() + (10 if drawn else 0.1)
        while not screen.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    assert ("targets" in screen.getvalue()) == drawn
    assert drawn or not screen.getvalue()
