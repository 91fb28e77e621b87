"""The wheel: its tag, what it holds, and that a bundle runs where nothing else is installed."""

import os
import platform
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

import edgelora
import tiny
from elf import MACHINES, check_release
from test_float_oracle import make_adapter

ROOT = Path(__file__).parent.parent
HEADERS = Path(sys.prefix) / "headers"  # of ./dev
NEEDED = {"click", "jinja2", "numpy", "onnxruntime", "rich", "tokenizers"}
CONVERTER = ("onnx", "torch", "transformers", "peft", "safetensors", "gguf", "bitsandbytes")
ADAPTERS = ("butler", "json", "pirate")
pytestmark = pytest.mark.slow


def run(*command: object, **environment: str) -> str:
    arguments = list(map(str, command))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=False, env=clean | environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the tools of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    settings = {"build-dir": str(folder / "build")}
    if HEADERS.is_dir():
        settings["cmake.define.EDGELORA_HEADER_CACHE"] = str(HEADERS)
    options = [f"--config-settings={name}={value}" for name, value in settings.items()]
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    tools = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    run(*pip, "-w", folder, *options, ROOT, PATH=tools, CMAKE_GENERATOR="Ninja")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> Mapping[str, int]:
    """Path → size in bytes."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = ROOT / ".ci" / "constraints.txt"
    run(python, "-m", "pip", "install", "-q", "-c", constraints, wheel)
    return python


def test_tag_is_for_every_python_on_this_platform(wheel: Path) -> None:
    name, built, python, abi, platform = wheel.stem.split("-")
    assert (name, built, python, abi) == ("edgelora", version("edgelora"), "py3", "none")
    assert platform == sysconfig.get_platform().replace("-", "_").replace(".", "_")


def test_it_holds_library_header_and_profiles(contents: Mapping[str, int]) -> None:
    profiles = {path.parent.name for path in (ROOT / "devices").glob("*/profile.toml")}
    expected = {f"edgelora/devices/{profile}/profile.toml" for profile in profiles}
    expected |= {"edgelora/libedgelora.so", "edgelora/include/edgelora.h"}
    files = ("adapter_config.json", "adapter_model.safetensors")
    expected |= {f"edgelora/adapters/{name}/{file}" for name in ADAPTERS for file in files}
    assert expected <= set(contents)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "edgelora").rglob("*.py")}
    assert modules <= set(contents)


def test_it_holds_nothing_else(contents: Mapping[str, int]) -> None:
    kinds = (".py", "profile.toml", "edgelora/libedgelora.so", "edgelora/include/edgelora.h")
    kinds += ("edgelora/evaluation/text.txt", "edgelora/report/page.html.jinja")
    inside = {name for name in contents if ".dist-info/" not in name}
    demo = {name for name in inside if name.startswith("edgelora/adapters/")}
    assert [name for name in inside - demo if not name.endswith(kinds)] == []
    assert [name for name in inside if "test" in name or not name.startswith("edgelora/")] == []


def test_library_is_small_and_stripped(wheel: Path, tmp_path: Path) -> None:
    machine = platform.machine()
    if machine not in MACHINES:
        pytest.skip(f"a library for {machine} has other names")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("edgelora/libedgelora.so", tmp_path)
    check_release(Path(library), MACHINES[machine])


def test_tiny_bundle_runs_without_the_converter(python: Path, tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter})
    found = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    assert run(python, "-c", found, *CONVERTER) == "[]\n"
    where = run(python, "-c", "import edgelora; print(edgelora.__file__)")
    assert Path(where).is_relative_to(python.parent.parent)
    said = run(
        python, "-m", "edgelora", "run", tmp_path / "bundle", "--prompt", "The fox",
        "--adapter", "a", "--max-tokens", "4", "--temperature", "0",
    )  # fmt: skip
    assert said.strip()
    assert "adapter a" in run(python, "-m", "edgelora", "verify", tmp_path / "bundle")


def test_metadata_asks_for_the_runtime_only(python: Path) -> None:
    code = "from importlib.metadata import requires; print('\\n'.join(requires('edgelora')))"
    asked = [line for line in run(python, "-c", code).splitlines() if "extra ==" not in line]
    assert {line.partition(">")[0] for line in asked} == NEEDED
