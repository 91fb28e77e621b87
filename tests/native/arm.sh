#!/usr/bin/env bash
# Tests of the ARM kernels on a machine that has no ARM: cross-built, then run by qemu on a CPU of each kind.
# Does nothing where compiler or emulator are missing (Debian: g++-aarch64-linux-gnu, qemu-user-static).
#
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export CMAKE_GENERATOR=Ninja EDGELORA_TEST_ONE_IN=${EDGELORA_TEST_ONE_IN-7}
for tool in aarch64-linux-gnu-g++ qemu-aarch64-static; do
  command -v $tool >/dev/null || { echo "ARM kernels are not tested: no $tool"; exit 0; }
done

build=.venv/native-arm64
mkdir -p $build
{ cmake -S runtime -B $build -DCMAKE_TOOLCHAIN_FILE="$PWD/runtime/cmake/toolchains/linux-arm64.cmake" \
    -DCMAKE_BUILD_TYPE=Release -DEDGELORA_BUILD_TESTS=ON -DEDGELORA_HEADER_CACHE="$PWD/.venv/headers" &&
  cmake --build $build --target kernels_test --parallel "$(nproc)"; } >$build/build.log 2>&1 ||
  { cat $build/build.log; exit 1; }

# All at once; each CPU's output in turn.
declare -A isa_of=([cortex-a53]=neon [cortex-a76]=neon_dotprod [max]=neon_i8mm) process=()
for cpu in "${!isa_of[@]}"; do
  qemu-aarch64-static -cpu "$cpu" -L /usr/aarch64-linux-gnu $build/kernels/kernels_test \
    "${isa_of[$cpu]}" >$build/$cpu.log &
  process[$cpu]=$!
done
failed=0
for cpu in "${!process[@]}"; do
  wait "${process[$cpu]}" || failed=1
  echo "emulated $cpu:"
  cat $build/$cpu.log
done
exit $failed
