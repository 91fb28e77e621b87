#!/usr/bin/env bash
# Native tests with a sanitizer, whose every finding is a failure.
#
#   sanitized.sh thread crew_test …            what several threads run
#   sanitized.sh address,undefined ops_test …  memory; the emulated ISAs are left out: they take minutes to build
#
# With -O2 instead of -O1 AVX-512's kernels alone take minutes more to compile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export EDGELORA_TEST_ONE_IN=${EDGELORA_TEST_ONE_IN-7}
sanitizer=$1 build=.venv/sanitized-${1%%,*} log=.venv/build-sanitized-${1%%,*}.log
shift
{ cmake -S runtime -B "$build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" \
    -DEDGELORA_BUILD_TESTS=ON -DSANITIZE="$sanitizer" -DSIMDE=OFF -DEDGELORA_HEADER_CACHE="$PWD/.venv/headers" &&
  cmake --build "$build" --parallel "$(nproc)" --target "$@"; } >"$log" 2>&1 || { cat "$log"; exit 1; }
for name in "$@"; do
  echo "$name, with -fsanitize=$sanitizer: $("$(find "$build" -name "$name" -type f -perm -u+x)" | tail -n 1)"
done
