"""What the commands say: text as it is given, one line for an error, whole lines in a pipe."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgelora
import tiny
from calling import Call
from edgelora.cli import cli
from edgelora.config import read_config
from edgelora.errors import EdgeLoraError
from edgelora.manifest import manifest_bytes, read_manifest
from edgelora.verify import verify
from test_float_oracle import make_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), target_modules="all-linear")


@pytest.fixture(scope="module")
def bundle(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "bundle"
    edgelora.export(base, out, adapters={"a": adapter})
    return out


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", bundle, tmp_path / "copy"], check=True)
    return tmp_path / "copy"


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """`changes` replace top-level values, the digest is true; None removes one."""
    fields = json.loads((folder / "manifest.json").read_text())
    fields = {key: value for key, value in (fields | changes).items() if value is not None}
    head = ("format", "format_version", "digest")
    kept = {key: value for key, value in fields.items() if key not in head}
    (folder / "manifest.json").write_bytes(manifest_bytes(kept))


# ---- text as it is ----


@pytest.mark.parametrize("name", ["m[/x]", "a[b]", "a:smile:b"])
def test_names_are_no_markup(call: Call, base: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.parent.mkdir(exist_ok=True)
    said = call("export", base, "-o", folder)
    assert said.code == 0 and said.err == ""
    assert name.rpartition("/")[2] in said.out
    assert name.rpartition("/")[2] in call("inspect", folder).out


def test_name_of_the_base_is_no_markup(call: Call, copy: Path) -> None:
    fields = json.loads((copy / "manifest.json").read_text())
    rewrite_manifest(copy, base=fields["base"] | {"name": "x[/bold]y"})
    assert "x[/bold]y" in call("inspect", copy).out


def test_columns_are_neither_cut_nor_wrapped(call: Call, adapter: Path) -> None:
    lines = call("devices", "list").out.splitlines()
    profiles = json.loads(call("devices", "list", "--json").out)
    assert len(lines) == 1 + len(profiles)
    assert all(p["name"] in line for p, line in zip(profiles, lines[1:], strict=True))
    items = [entry["item"] for entry in json.loads(call("inspect", adapter, "--json").out)]
    longest = max((item for item in items if ".lora_" not in item), key=len)
    assert longest in call("inspect", adapter).out


# ---- one line ----


def test_failing_export_prints_the_line_only(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "nothing" in fails("export", tmp_path / "nothing", "-o", tmp_path / "b")


@pytest.mark.parametrize("command", ["inspect", "verify", "run"])
def test_too_long_a_name_is_one_line(
    fails: Callable[..., str], tmp_path: Path, command: str
) -> None:
    rest = ("--prompt", "x") if command == "run" else ()
    fails(command, tmp_path / ("n" * 260), *rest)


def test_control_characters_stay_in_the_line(fails: Callable[..., str], tmp_path: Path) -> None:
    assert r"a\nb" in fails("inspect", tmp_path / "a\nb")


def test_memory_error_is_one_line(
    fails: Callable[..., str], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("edgelora.cli.inspect.read_manifest", exhausted)
    assert "memory" in fails("inspect", bundle)


@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_bad_prompt_is_one_line(fails: Callable[..., str], bundle: Path, raw: tuple[str]) -> None:
    assert "the prompt is empty" in fails("run", bundle, "--prompt", "", *raw)
    assert "UTF-8" in fails("run", bundle, "--prompt", os.fsdecode(b"a\xff"), *raw)


def test_too_long_a_prompt_says_how_long(fails: Callable[..., str], bundle: Path) -> None:
    held = read_manifest(bundle)["model"]["context_length"]
    said = fails("run", bundle, "--raw", "--prompt", "x " * (held + 1))
    assert "tokens" in said and f"holds {held}" in said and "--context-length" in said


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "tokenizer.json"])
def test_file_that_is_not_utf8_is_one_line(
    fails: Callable[..., str], copy: Path, name: str
) -> None:
    (copy / name).write_bytes(b"\xff\xfe")
    files = json.loads((copy / "manifest.json").read_text())["files"]
    rewrite_manifest(copy, files=files | {name: {"size": 2, "sha256": "0" * 64}})
    assert name in fails("run", copy, "--prompt", "x")


def test_template_of_a_base_that_is_not_utf8_is_one_line(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    (base / "chat_template.jinja").write_bytes(b"\xff\xfe")
    said = fails("export", base, "-o", tmp_path / "b")
    assert "chat_template.jinja" in said and "UTF-8" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": None}, "model is missing"),
        ({"base": "x"}, "base is not an object"),
        ({"adapters": None}, "adapters is missing"),
        ({"adapters": {"a": 3}}, "adapters.a is not an object"),
        ({"plan": {"format": 4, "mode": "side"}}, "plan.format is not a string"),
        ({"files": {"model.onnx": 7}}, "files.model.onnx is not an object"),
        ({"files": {"model.onnx": {"size": True, "sha256": ""}}}, "size is not an integer"),
        ({"files": []}, "files is not an object"),
        ({"files": {}}, "not among the files"),
        ({"targets": [1]}, r"targets[0] is not an object"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_manifest_of_another_structure_is_one_line(
    fails: Callable[..., str], copy: Path, changes: dict[str, Any], said: str, command: str
) -> None:
    rewrite_manifest(copy, **changes)
    assert said in fails(command, copy)


def test_qwen_window_without_a_number_of_layers_is_one_line() -> None:
    fields = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
    with pytest.raises(EdgeLoraError, match="num_hidden_layers"):
        read_config(fields, Path("config.json"))


# ---- usage ----


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--max-tokens", 0),
        ("run", "--max-tokens", -1),
        ("run", "--threads", -1),
        ("run", "--seed", -1),
        ("run", "--seed", 2**64),
        ("run", "--adapter", "a:"),
        ("run", "--adapter", ":1"),
        ("run", "--adapter", "a:nan"),
        ("run", "--adapter", "a:inf"),
        ("chat", "--adapter", "a:"),
        ("bench", "--adapter", "a:"),
        ("bench", "--threads", 2**32),
        ("demo", "--threads", -1),
    ],
)
def test_values_out_of_range_are_usage_errors(call: Call, arguments: tuple[object, ...]) -> None:
    command, *rest = arguments
    needed = {"run": ("bundle", "--prompt", "x"), "demo": ()}.get(str(command), ("bundle",))
    assert call(command, *needed, *rest).code == 2


def test_every_option_has_a_help_and_every_command_an_example() -> None:
    context = cli.make_context("edgelora", [], resilient_parsing=True)
    commands = [cli.get_command(context, name) for name in cli.list_commands(context)]
    commands += [each for one in commands for each in getattr(one, "commands", {}).values()]
    for command in commands:
        assert command is not None and "\b\n" in (command.help or ""), command
        assert "Example:" in (command.help or "")
        for option in command.params:
            assert option.param_type_name == "argument" or option.help, (command.name, option.name)


# ---- run, bench, demo ----


def test_many_tokens_end_with_the_context(call: Call, bundle: Path) -> None:
    with edgelora.load(bundle, context_length=12) as model:
        done = model.complete("x", max_new_tokens=10**12, ignore_eos=True)
        assert done.finish == "context"
    said = call("run", bundle, "--prompt", "x", "--max-tokens", 99999999999, "--json")
    assert said.code == 0 and json.loads(said.out)["finish"] in ("stop", "context")


def test_exactly_the_tokens_left_end_by_length(bundle: Path) -> None:
    with edgelora.load(bundle) as model, model.session(context_length=8) as session:
        session.prefill([1, 2, 3])
        tokens, finish = session.generate(5, edgelora.model.Sampling(ignore_eos=True))
        assert (len(tokens), finish) == (5, "length")


def test_integers_out_of_range_are_refused_in_python_too(bundle: Path) -> None:
    with pytest.raises(EdgeLoraError, match="threads is 4294967296"):
        edgelora.load(bundle, threads=2**32)
    with edgelora.load(bundle) as model:
        with pytest.raises(EdgeLoraError, match="seed is -1"):
            model.generate("x", seed=-1)
        with pytest.raises(EdgeLoraError, match="top_k is"):
            model.generate("x", top_k=2**40)
        with pytest.raises(EdgeLoraError, match="context_length is"):
            model.session(context_length=2**32 + 5)
        with model.session() as session:
            session.prefill([1])
            with pytest.raises(EdgeLoraError, match="position"):
                session.rewind(2**64)


def test_bench_beyond_the_context_is_refused_at_once(
    fails: Callable[..., str], bundle: Path
) -> None:
    assert "context holds" in fails("bench", bundle, "--prompt-tokens", 99999999999999)
    assert "context holds" in fails("bench", bundle, "--new-tokens", 99999999999999)


def test_bench_takes_a_weighted_adapter(call: Call, bundle: Path) -> None:
    few = ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1, "--json")
    said = json.loads(call("bench", bundle, "--adapter", "a:0.5", *few).out)
    assert said["adapter"] == {"a": 0.5}
    assert json.loads(call("bench", bundle, "--adapter", "a", *few).out)["adapter"] == "a"


def test_bench_with_adapters_in_memory_measures_the_base(
    call: Call, fails: Callable[..., str], bundle: Path
) -> None:
    few = ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1, "--json")
    assert json.loads(call("bench", bundle, "--load", "a", *few).out)["adapter"] is None
    assert "nobody" in fails("bench", bundle, "--load", "nobody", *few)


def test_demo_checks_the_folder_first(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "exists already" in fails("demo", "--keep", tmp_path)
    assert "no bundle" in fails("demo", "--keep", tmp_path, "--force")


# ---- chat ----


def chat(bundle: Path, text: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "edgelora", "chat", bundle, "--max-tokens", "3", *arguments]
    return subprocess.run(command, input=text, capture_output=True, check=False)


def test_chat_goes_on_after_a_message_that_cannot_be_answered(bundle: Path) -> None:
    held = read_manifest(bundle)["model"]["context_length"]
    done = chat(bundle, b"hello\n" + b"x " * held + b"\n\xff\nhello\n/quit\n")
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert said.count("error: ") == 2 and f"holds {held}" in said and "UTF-8" in said
    assert done.stdout.count(b"base> ") == 5


def test_chat_takes_weights(bundle: Path) -> None:
    lines = b"hello\n/adapter a\nhello\n/adapter a:0.25\nhello\n/adapter a:\n/adapter\n/base\n"
    done = chat(bundle, lines, "--adapter", "a:0.5")
    assert done.returncode == 0, done.stderr
    for title in (b"a:0.5> ", b"a> ", b"a:0.25> ", b"base> "):
        assert title in done.stdout
    assert b"not a number" in done.stderr and b"which?" in done.stderr


# ---- inspect, verify ----


def test_inspect_adapter_has_a_row_for_each_kind(call: Call, adapter: Path) -> None:
    lines = call("inspect", adapter).out.splitlines()
    rows = [line.split() for line in lines if line.startswith("q_proj")]
    assert rows == [["q_proj", "×2", "exported", "rank", "4,", "scaling", "3"]]
    items = [entry["item"] for entry in json.loads(call("inspect", adapter, "--json").out)]
    assert sum("q_proj.lora_A" in item for item in items) == 2


def test_inspect_names_the_modules_that_were_saved_whole(
    call: Call, base: Path, tmp_path: Path
) -> None:
    saved = ["k_proj", "norm", "input_layernorm"]
    folder = make_adapter(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=saved)
    said = call("inspect", folder).out
    for row in ("k_proj.weight ×2", "input_layernorm.weight ×2", "base_model.model.model.norm.we"):
        assert re.search(rf"(?m)^{re.escape(row)}.*exported", said), said


def test_inspect_base_says_how_it_is_stored(call: Call, base: Path) -> None:
    said = call("inspect", base).out
    assert "llama, 2 layers" in said and "matrices as float: quantized at export" in said
    assert "norms and biases as float: exported as they are" in said
    tensors = json.loads(call("inspect", base, "--json").out)["tensors"]
    names = {tensor["name"]: tensor for tensor in tensors}
    assert names["model.norm.weight"]["stored_as"] == "float"


def test_verify_says_what_is_bound_and_finds_what_is_not(bundle: Path, copy: Path) -> None:
    [base] = [check for check in verify(bundle) if check.what == "base"]
    assert "adapters bound to it: a" in base.detail
    fields = json.loads((copy / "manifest.json").read_text())
    rewrite_manifest(copy, base=fields["base"] | {"fingerprint": "sha256:" + "cd" * 32})
    with pytest.raises(EdgeLoraError, match="adapter 'a' is bound to the base"):
        list(verify(copy))
