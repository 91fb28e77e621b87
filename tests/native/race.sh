#!/usr/bin/env bash
# What several threads run, built with ThreadSanitizer: a race is a failure. Called by tests/run.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tests=(crew_test linear_job_test attention_job_test)
log=.venv/build-race.log
{ cmake -S runtime -B .venv/race -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEDGELORA_BUILD_TESTS=ON -DSANITIZE=thread \
    -DEDGELORA_HEADER_CACHE="$PWD/.venv/headers" &&
  cmake --build .venv/race --parallel "$(nproc)" --target "${tests[@]}"; } >"$log" 2>&1 || { cat "$log"; exit 1; }
for name in "${tests[@]}"; do
  echo "$name, by ThreadSanitizer: $(".venv/race/tests/$name")"
done
