"""Fetch the two header-only build dependencies into a cache folder and print their include folders.

ONNX Runtime's C headers and nlohmann/json come from Debian's packages, unpacked without root
through an apt state of our own, so the machine's is left alone. Prints two lines: the folder of
onnxruntime_c_api.h, the folder of nlohmann/json.hpp.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path

SUITE = "trixie"  # the first Debian release with libonnxruntime-dev
PACKAGES = ("libonnxruntime-dev", "nlohmann-json3-dev")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CACHE = Path.home() / ".cache" / "edgelora" / "headers"
HEADERS = ("onnxruntime_c_api.h", "nlohmann/json.hpp")
ADVICE = "give -DONNXRUNTIME_INCLUDE_DIR=... and -DNLOHMANN_JSON_INCLUDE_DIR=..."

# Machines without apt: the projects' own release archives, the versions of the Debian packages.
# Only headers are used, and they are the same for every architecture: x64 serves all.
RELEASE_ARCHIVES = (  # URL, SHA-256
    (
        "https://github.com/microsoft/onnxruntime/releases/download/v1.21.0/onnxruntime-linux-x64-1.21.0.tgz",
        "7485c7e7aac6501b27e353dcbe068e45c61ab51fbaf598d13970dfae669d20bf",
    ),
    (
        "https://github.com/nlohmann/json/releases/download/v3.11.3/include.zip",
        "a22461d13119ac5c78f205d3df1db13403e58ce1bb1794edc9313677313f4a9d",
    ),
)


class FetchError(Exception):
    """One line: what failed."""


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise FetchError(f"{' '.join(command[:1] + command[-1:])}: {lines[-1]}")
    return done.stdout


def codename() -> str | None:
    """The suite of this machine if it is a Debian, else None."""
    release = Path("/etc/os-release")
    if not release.is_file() or not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return None
    lines = release.read_text(encoding="utf-8").splitlines()
    fields = dict(line.split("=", 1) for line in lines if "=" in line)
    return fields.get("VERSION_CODENAME", "").strip('"') if fields.get("ID") == "debian" else None


def machine_sources(suite: str, folder: Path) -> str:
    """The machine's own entries for `suite`, component main, as sources of SUITE."""
    template = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    targets = run(["apt-get", "indextargets", "--format", template, "Created-By: Packages"], folder)
    option = f" [signed-by={KEYRING}]" if KEYRING.is_file() else ""  # else apt's trusted.gpg.d
    entries = (target.split("|") for target in targets.splitlines())
    lines = [
        f"deb{option} {entry[0]} {SUITE} main\n"
        for entry in entries
        if entry[1:] == [suite, "main"]
    ]
    if not lines:
        raise FetchError(f"apt has no source for {suite} main")
    return "".join(dict.fromkeys(lines))


def fetch_with_apt(suite: str, folder: Path) -> None:
    """Fill `folder` with the unpacked packages."""
    with tempfile.TemporaryDirectory() as name:
        state = Path(name)
        for part in ("state/lists/partial", "cache/archives/partial", "debs"):
            (state / part).mkdir(parents=True)
        (state / "sources.list").write_text(machine_sources(suite, state), encoding="utf-8")
        apt = ["apt-get", "-qq"]
        for option in (
            f"Dir::State={state}/state",
            f"Dir::Cache={state}/cache",
            f"Dir::Etc::SourceList={state}/sources.list",
            "Dir::Etc::SourceParts=/dev/null",
            "APT::Sandbox::User=",
            "Acquire::Languages=none",
        ):
            apt += ["-o", option]
        run([*apt, "update"], state)
        run([*apt, "download", *PACKAGES], state / "debs")
        for deb in sorted((state / "debs").glob("*.deb")):
            run(["dpkg-deb", "-x", str(deb), str(folder)], state)


def fetch_release_archives(folder: Path) -> None:
    """Fill `folder` from the projects' release archives, whose bytes are known."""
    print("not a Debian machine: taking the projects' release archives", file=sys.stderr)
    for url, sha256 in RELEASE_ARCHIVES:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise FetchError(f"{url}: SHA-256 is not {sha256}: not unpacked")
        data = io.BytesIO(content)
        if url.endswith(".zip"):
            zipfile.ZipFile(data).extractall(folder)
        else:
            with tarfile.open(fileobj=data) as archive:
                archive.extractall(folder, filter="data")


def include_folders(folder: Path) -> list[Path] | None:
    """The include folder of each header below `folder`, or None if one is missing."""
    found = []
    for header in HEADERS:
        hits = sorted(folder.rglob(header))
        if not hits:
            return None
        found.append(hits[0].parents[header.count("/")])
    return found


def fetch(folder: Path) -> list[Path]:
    """The include folders, fetched first unless they are there.

    `folder` appears whole or not at all.
    """
    found = include_folders(folder)
    if found:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        fresh = Path(name) / "headers"
        fresh.mkdir()
        suite = codename()
        if suite:
            fetch_with_apt(suite, fresh)
        else:
            fetch_release_archives(fresh)
        if include_folders(fresh) is None:
            raise FetchError("the packages lack " + " or ".join(HEADERS))
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    return include_folders(folder) or []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=CACHE)
    try:
        found = fetch(parser.parse_args().folder.resolve())
    except (FetchError, OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        print(f"cannot fetch the headers: {error}; {ADVICE}", file=sys.stderr)
        return 1
    print("\n".join(str(path) for path in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
