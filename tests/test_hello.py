"""The header is C, and the example of the C API does what it says."""

import shutil
import subprocess
from pathlib import Path

import pytest

import edgelora
from edgelora import native
from toy_bundle import VOCAB_SIZE, write_toy_bundle

RUNTIME = Path(__file__).parent.parent / "runtime"
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic"]
PROMPT = ["5", "9", "12"]


@pytest.fixture(scope="module")
def hello(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    out, library = tmp_path_factory.mktemp("hello") / "hello", native.library_path()
    subprocess.run(
        [
            *(compiler, *FLAGS, f"-I{RUNTIME / 'include'}", "-o", out),
            *(RUNTIME / "examples" / "hello.c", library, f"-Wl,-rpath,{library.parent}"),
        ],
        check=True,
    )
    return out


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


def run(hello, bundle, *arguments):
    command = [hello, bundle, native.onnxruntime_path(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_hello_prints_the_tokens_of_base_and_adapter(hello, bundle):
    done = run(hello, bundle, "one", *PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    base, one = done.stdout.splitlines()
    with edgelora.load(bundle) as model:
        for line, name, adapter in ((base, "base", None), (one, "one", "one")):
            with model.session(adapter=adapter) as session:
                session.prefill([int(token) for token in PROMPT])
                expected = session.decode(16)
            if adapter is None:  # the toy's logits depend on the handle's number
                assert line == " ".join([f"{name}:", *map(str, expected)])
            assert line.startswith(f"{name}:")


def test_hello_without_adapter_repeats_the_base(hello, bundle):
    base, again = run(hello, bundle, "-", *PROMPT).stdout.splitlines()
    assert base.removeprefix("base:") == again.removeprefix("-:")


@pytest.mark.parametrize(
    ("adapter", "token", "message"),
    [
        ("three", "1", 'no adapter "three"; it has one, two'),
        ("one", str(VOCAB_SIZE), f"token 0 is {VOCAB_SIZE}, not in 0…{VOCAB_SIZE - 1}"),
    ],
)
def test_hello_ends_with_one_line_when_something_is_wrong(hello, bundle, adapter, token, message):
    done = run(hello, bundle, adapter, token)
    assert done.returncode == 1
    assert done.stderr.startswith("hello: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("tokens", [0, 257])
def test_hello_tells_its_usage_when_the_prompt_has_no_room(hello, bundle, tokens):
    done = run(hello, bundle, "one", *["1"] * tokens)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: hello BUNDLE")


def test_library_never_prints_or_exits(bundle):
    """No undefined symbol of the library writes to a stream or ends the process."""
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("no nm")
    listing = subprocess.run(
        [tool, "-D", "--undefined-only", native.library_path()],
        capture_output=True,
        text=True,
        check=True,
    )
    symbols = {line.split()[-1].partition("@")[0] for line in listing.stdout.splitlines()}
    forbidden = {"printf", "fprintf", "puts", "putchar", "perror", "exit", "_exit", "abort"}
    forbidden |= {"_ZSt4cout", "_ZSt4cerr", "_ZSt4clog", "fwrite", "write", "socket", "connect"}
    assert not symbols & forbidden


def test_library_exports_the_api_alone():
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("no nm")
    listing = subprocess.run(
        [tool, "-D", "--defined-only", native.library_path()],
        capture_output=True,
        text=True,
        check=True,
    )
    symbols = {line.split()[-1] for line in listing.stdout.splitlines()}
    header = (RUNTIME / "include" / "edgelora.h").read_text()
    ours = {symbol for symbol in symbols if symbol.startswith("edgelora_")}
    assert all(f"{symbol}(" in header for symbol in ours)
    assert symbols - ours == {"RegisterCustomOps"}
