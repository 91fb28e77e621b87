"""The commands as a user meets them: a process, its output, its exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from test_float_oracle import make_adapter

COMMANDS = [
    "export", "add-adapter", "run", "chat", "inspect", "verify", "bench", "devices", "demo",
    "completion", "compose",
]  # fmt: skip
WITHOUT_CONVERTER = """
import sys
heavy = {"torch", "transformers", "peft", "bitsandbytes", "onnx", "gguf", "safetensors"}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in heavy:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from edgelora.cli import main
main()
"""


def edgelora(
    *arguments: object, program: str = "from edgelora.cli import main; main()", text: str = ""
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=text, check=False)


def ok(*arguments: object, **options: str) -> str:
    done = edgelora(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(*arguments: object, **options: str) -> str:
    """The one line that a failing command prints."""
    done = edgelora(*arguments, **options)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), target_modules="all-linear")


@pytest.fixture(scope="module")
def bundle(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "bundle"
    said = ok("export", base, "-o", out, "--adapter", f"a={adapter}")
    assert "bits a weight" in said
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    assert "Example" in ok(command, "--help")


def test_help_of_compose_says_which_method_is_the_weighted_sum() -> None:
    assert "only cat equals the weighted sum" in " ".join(ok("compose", "--help").split())


def test_help_names_every_command_even_without_the_converter() -> None:
    for program in ("from edgelora.cli import main; main()", WITHOUT_CONVERTER):
        said = ok("--help", program=program)
        assert all(f"  {command} " in said for command in COMMANDS)


def test_run_needs_no_converter(bundle: Path) -> None:
    said = ok("run", bundle, "--prompt", "jump", "--max-tokens", 4, program=WITHOUT_CONVERTER)
    assert said.endswith("\n")
    refused = fails("export", bundle, "-o", "x", program=WITHOUT_CONVERTER)
    assert "pip install 'edgelora[export]'" in refused


def test_run_json_has_text_tokens_and_adapter(bundle: Path) -> None:
    said = json.loads(
        ok("run", bundle, "--prompt", "jump", "--adapter", "a:0.5", "--max-tokens", 5, "--json")
    )
    assert len(said["token_ids"]) <= 5
    assert said["adapter"] == {"a": 0.5}
    assert isinstance(said["text"], str)


def test_run_is_reproducible_with_a_seed(bundle: Path) -> None:
    arguments = (
        "run",
        bundle,
        "--prompt",
        "over",
        "--temperature",
        1.5,
        "--max-tokens",
        8,
        "--json",
    )
    ids = [json.loads(ok(*arguments, "--seed", seed))["token_ids"] for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_unknown_adapter_is_one_line_with_the_names_there_are(bundle: Path) -> None:
    said = fails("run", bundle, "--prompt", "x", "--adapter", "nobody")
    assert "nobody" in said and "a" in said


def test_usage_errors_exit_with_2(bundle: Path) -> None:
    assert edgelora("run", bundle).returncode == 2
    assert edgelora("export", "base").returncode == 2
    assert edgelora("nothing").returncode == 2


def test_dry_run_prints_the_plan_and_writes_nothing(base: Path, tmp_path: Path) -> None:
    plan = json.loads(
        ok("export", base, "-o", tmp_path / "b", "--dry-run", "--json", "--device", "pixel-8")
    )
    assert plan["device"] == "pixel-8" and plan["reasons"]["format"]
    assert list(tmp_path.iterdir()) == []


def test_add_adapter_makes_it_usable(base: Path, adapter: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    ok("export", base, "-o", bundle)
    ok("add-adapter", bundle, f"late={adapter}")
    ok("verify", bundle)
    assert "already" in fails("add-adapter", bundle, f"late={adapter}")
    ok("add-adapter", bundle, f"late={adapter}", "--force")
    ok("run", bundle, "--prompt", "x", "--adapter", "late", "--max-tokens", 2)


def test_bound_adapter_goes_to_the_same_base_only(bundle: Path, base: Path, tmp_path: Path) -> None:
    bound = bundle / "adapters" / "a"
    ok("export", base, "-o", tmp_path / "same", "--format", "nf4")
    ok("add-adapter", tmp_path / "same", f"moved={bound}")
    ok("verify", tmp_path / "same")
    other = tiny.tiny_llama(tmp_path / "other", seed=5)
    ok("export", other, "-o", tmp_path / "foreign")
    assert "made for the base" in fails("add-adapter", tmp_path / "foreign", f"moved={bound}")


def test_merged_bundle_takes_no_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    ok("export", base, "-o", tmp_path / "m", "--mode", "merge", "--adapter", f"a={adapter}")
    assert "merged" in fails("add-adapter", tmp_path / "m", f"b={adapter}")


def test_inspect_says_what_is_in_it(bundle: Path, adapter: Path, base: Path) -> None:
    assert "rank 4" in ok("inspect", bundle)
    assert "lora_alpha" in ok("inspect", adapter)
    assert "matrices" in ok("inspect", base)
    assert "no such" in fails("inspect", base / "nothing")


def test_verify_finds_a_flipped_byte_anywhere(bundle: Path, tmp_path: Path) -> None:
    for name in json.loads((bundle / "manifest.json").read_text())["files"]:
        copy = tmp_path / name.replace("/", "_")
        subprocess.run(["cp", "-r", bundle, copy], check=True)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        assert name.rpartition("/")[2] in fails("verify", copy)


def test_verify_finds_a_stranger(bundle: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", bundle, tmp_path / "copy"], check=True)
    (tmp_path / "copy" / "extra.bin").write_bytes(b"x")
    assert "extra.bin" in fails("verify", tmp_path / "copy")


def test_bench_json_has_the_promised_keys(bundle: Path) -> None:
    arguments = ("--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 1, "--threads", 1, "--json")
    said = json.loads(ok("bench", bundle, *arguments))
    rates = {"prefill_tokens_per_second", "decode_tokens_per_second"}
    times = {"time_to_first_token_ms", "load_ms", "switch_us"}
    promised = rates | times | {"resident_mb", "weight_mb", "threads", "isa", "machine"}
    assert promised <= set(said)
    assert said["decode_tokens_per_second"] > 0 and said["threads"] == 1


def test_chat_switches_adapters_in_the_conversation(bundle: Path) -> None:
    lines = "hello\n/adapter a\nhello\n/adapter nobody\n/base\n/what\n/quit\n"
    done = edgelora("chat", bundle, "--max-tokens", "3", text=lines)
    assert done.returncode == 0
    assert "nobody" in done.stderr and "/what" in done.stderr
    assert "a> " in done.stdout and "base> " in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    assert "_EDGELORA_COMPLETE" in ok("completion", shell)


def test_devices_lists_shows_and_detects() -> None:
    assert "raspberry-pi-5" in ok("devices")
    assert "source" in ok("devices", "show", "pixel-8")
    assert "isa" in json.loads(ok("devices", "detect", "--json"))
    assert "unknown device" in fails("devices", "show", "toaster")
