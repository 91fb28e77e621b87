#!/usr/bin/env bash
# Linters, native tests, then pytest; stops at the first that fails. Called by ./dev test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=.venv/bin
$bin/ruff format --check .
$bin/ruff check .
$bin/mypy
cmake -S runtime -B build/native -DCMAKE_BUILD_TYPE=Release -DEDGELORA_BUILD_TESTS=ON >build-native.log 2>&1 ||
  { cat build-native.log; exit 1; }
cmake --build build/native --parallel "$(nproc)"
ctest --test-dir build/native --output-on-failure
exec $bin/pytest "$@"
