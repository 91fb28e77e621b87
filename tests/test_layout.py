"""The architecture's laws: who may import what, who may print, how long files and functions may
be.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "edgelora"
MODULES = sorted(PACKAGE.rglob("*.py"))
CPP = [path for kind in ("*.cc", "*.h", "*.inc", "*.c") for path in (ROOT / "runtime").rglob(kind)]
TESTS = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "tests" / "native").glob("*.*")])
TOP_LEVEL = {
    "pyproject.toml", "edgelora", "runtime", "tests", "devices", "README.md", "ARCHITECTURE.md",
    "CHANGELOG.md", "LICENSE", "dev",
}  # fmt: skip
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "onnx", "gguf", "safetensors", "optimum"}
RUNTIME_HALF = {
    "answer", "bench", "chat_template", "device", "errors", "generation", "interruption",
    "manifest", "manifest_fields", "model", "native", "session", "text", "verify",
}  # fmt: skip
ARRAY_CODE = {
    "os",
    "numpy",
    "dataclasses",
    "collections",
    "typing",
    "concurrent",
    "edgelora.quantize",
}
# What of runtime/ a folder of it includes beside itself: whole folders, and single headers.
INCLUDES: dict[str, set[str]] = {
    "kernels": set(),
    "ops": {"kernels", "src/adapter_store.h", "src/element_type.h", "src/error.h",
            "src/ort_error.h"},
    "src": {"kernels", "edgelora.h", "ops/kv_layout.h", "ops/registration.h"},
}  # fmt: skip
MAX_LINES = 400
MAX_TEST_LINES = 700
MAX_COLUMNS = 100  # ruff sees to Python's
WRITING = {
    "export_adapter", "makedirs", "mkdir", "remove", "rename", "rmdir", "rmtree", "save",
    "symlink_to", "tofile", "touch", "unlink", "write_bytes", "write_text",
}  # fmt: skip
# Who else writes, and why: each fills the folder that whole_folder.new_folder gave it.
WRITERS = {
    ("exporter.py", "write_bundle"),
    ("exporter.py", "_write_adapter"),
    ("composition/folder.py", "write_folder"),
    ("exporter.py", "_write_report"),
    ("exporter.py", "_write_selfcheck"),
    ("onnx_adapter.py", "write_onnx_adapter"),  # ORT writes to a path only
    ("tokenizer.py", "write"),
}
MAX_FUNCTION_LINES = 60


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def part(path: Path) -> str:
    """The module of edgelora that a file belongs to: "graph" for edgelora/graph/nodes.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def within(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_follow_the_law(path: Path) -> None:
    names, own = set(imports(path)), part(path)
    if own in RUNTIME_HALF:
        assert not {name for name in names if within(name, HEAVY)}
        ours = {name.split(".")[1] for name in names if name.startswith("edgelora.")}
        assert ours <= RUNTIME_HALF, "the runtime half stands alone"
    if own in ("quantize", "merge"):
        assert all(within(name, ARRAY_CODE) for name in names), names
    if own == "graph":
        assert "pathlib" not in names and "os" not in names
        assert not {name for name in names if within(name, {"edgelora.checkpoint"})}
    heavy = {name for name in names if name.split(".")[0] in ("torch", "transformers", "peft")}
    assert not heavy or path == PACKAGE / "composition" / "pruned.py", heavy
    if own != "cli":
        assert not {name for name in names if within(name, {"click", "rich"})}
    if own not in ("cli", "__main__"):
        assert not {name for name in names if within(name, {"edgelora.cli"})}
    if own not in ("cli", "__init__"):
        assert "edgelora.exporter" not in names, "export is the only orchestrator"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_cli_prints_or_exits(path: Path) -> None:
    if part(path) == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("print", "sys.exit", "exit", "click.echo")


def writes(call: ast.Call) -> bool:
    """Whether it changes what is on the disk, by the name of the function or open's mode."""
    name = ast.unparse(call.func).rpartition(".")[2]
    if name == "open":
        values = [*call.args, *(option.value for option in call.keywords)]
        modes = [each.value for each in values if isinstance(each, ast.Constant)]
        return any(re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", str(mode)) for mode in modes)
    return name in WRITING or ast.unparse(call.func) == "os.replace"


def writers(path: Path) -> set[str]:
    """The functions of a file that write; "" for its top level."""
    tree = ast.parse(path.read_text())
    inside = {
        id(call): function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
    }
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {inside.get(id(call), "") for call in calls if writes(call)}


def test_bundle_is_the_only_writer() -> None:
    found = {(str(path.relative_to(PACKAGE)), name) for path in MODULES for name in writers(path)}
    others = {each for each in found if each[0] not in ("bundle.py", "whole_folder.py")}
    assert len(others) < len(found), "the search finds nothing"
    assert others == WRITERS


@pytest.mark.parametrize("path", [*MODULES, *CPP], ids=str)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", TESTS, ids=str)
def test_tests_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_TEST_LINES


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", CPP, ids=str)
def test_includes_follow_the_law(path: Path) -> None:
    own = path.relative_to(ROOT / "runtime").parts[0]
    names = re.findall(r'^#include ["<]([^">]+)[">]', path.read_text(), re.MULTILINE)
    ours = [name for name in names if (ROOT / "runtime" / name).exists()]
    if own == "include":
        assert set(names) <= {"stdbool.h", "stddef.h", "stdint.h"}
    if own == "kernels":
        assert all(name.startswith("kernels/") for name in ours), ours
        assert not [name for name in names if "onnxruntime" in name]
    else:
        isa_folders = [p.name for p in (ROOT / "runtime/kernels").iterdir() if p.is_dir()]
        assert not [n for n in ours if any(n.startswith(f"kernels/{i}/") for i in isa_folders)]


def test_lines_of_c_are_short() -> None:
    paths = [*CPP, *TESTS, *(ROOT / "tests" / "benchmarks").glob("*.c*")]
    for path in [each for each in paths if each.suffix in (".c", ".cc", ".h")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= MAX_COLUMNS, f"{path}:{number}"


def test_top_level_stays_small() -> None:
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert visible - {"build", "dist"} <= TOP_LEVEL


def test_no_junk_drawers() -> None:
    names = {path.stem for path in [*MODULES, *CPP]}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize("folder", INCLUDES)
def test_cpp_includes_what_the_map_says(folder: str) -> None:
    allowed = INCLUDES[folder] | {folder}
    for path in CPP:
        if path.relative_to(ROOT / "runtime").parts[0] == folder:
            for header in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE):
                assert {header, header.partition("/")[0]} & allowed, f"{path}: {header}"
