"""The build's headers: what comes from the network is unpacked only if its bytes are known."""

import importlib.util
import io
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "runtime" / "cmake" / "fetch_headers.py"


def test_release_archive_with_other_bytes_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("fetch_headers", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "codename", lambda: None)
    monkeypatch.setattr(script.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"x"))
    monkeypatch.setattr("sys.argv", ["fetch_headers.py", str(tmp_path / "headers")])
    assert script.main() == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "not unpacked" in said and "-DONNXRUNTIME_INCLUDE_DIR" in said
    assert list(tmp_path.iterdir()) == []
