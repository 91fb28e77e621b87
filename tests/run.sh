#!/usr/bin/env bash
# Linters, native tests and pytest, called by ./dev test. With arguments, pytest gets them, in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" CMAKE_GENERATOR=Ninja

ruff format --check .
ruff check .
mypy
log=.venv/build-native.log
{ cmake -S runtime -B .venv/native -DCMAKE_BUILD_TYPE=Release -DEDGELORA_BUILD_TESTS=ON \
    -DEDGELORA_HEADER_CACHE="$PWD/.venv/headers" &&
  cmake --build .venv/native --parallel "$(nproc)"; } >"$log" 2>&1 || { cat "$log"; exit 1; }
ctest --test-dir .venv/native --output-on-failure --parallel "$(nproc)"
bash tests/native/arm.sh
for tool in aarch64-linux-gnu-g++ qemu-aarch64-static clang++; do
  command -v "$tool" >/dev/null || echo "no $tool: tests/arm skips what needs it"
done

# What pytest leaves of the cores is enough for them.
said=.venv/sanitized.log
{ bash tests/native/sanitized.sh thread crew_test linear_job_test attention_job_test &&
  bash tests/native/sanitized.sh address,undefined crew_test linear_job_test linear_formats_test attention_job_test \
    adapter_store_test ops_test ort_error_test protobuf_test session_parts_test kernels_test; } >"$said" 2>&1 &
sanitized=$!
failed=0
if [ $# -gt 0 ]; then
  pytest "$@" || failed=1
else  # a process for each core, whose libraries need no more threads
  OMP_NUM_THREADS=1 pytest --numprocesses "$(nproc)" --dist loadfile --no-loadscope-reorder || failed=1
fi
wait "$sanitized" || failed=1
cat "$said"
exit $failed
