// The kernels for tests with a tolerance derived from exact integers.
#pragma once

#include <cstring>

#include "ops/registration.h"

namespace edgelora::test {

// This machine's, but never those that multiply bfloat16.
inline const kernels::KernelTable& integer_kernels() {
  const kernels::KernelTable& best = selected_kernels();
  if (std::strcmp(best.isa, "amx_bf16") != 0) return best;
  return *kernels::select_kernels(kernels::detect_features(), "avx512_vnni");
}

}  // namespace edgelora::test
