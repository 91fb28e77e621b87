// Bits of a feature mask. A bit means: the CPU has it and the OS saves its registers.
#pragma once

#include "kernels/kernels.h"

namespace edgelora::kernels {

enum : Features {
  kAvx2 = Features{1} << 0,
  kFma = Features{1} << 1,
  kF16c = Features{1} << 2,
  kAvx512f = Features{1} << 3,
  kAvx512bw = Features{1} << 4,
  kAvx512vl = Features{1} << 5,
  kAvx512dq = Features{1} << 6,
  kAvx512vnni = Features{1} << 7,
  kAvxVnni = Features{1} << 8,
  kAmxBf16 = Features{1} << 9,  // with AVX512-BF16; the process may use the tiles

  kNeon = Features{1} << 32,     // Advanced SIMD, part of every ARMv8-A
  kDotprod = Features{1} << 33,  // sdot, udot
  kI8mm = Features{1} << 34,     // smmla, ummla, usdot
};

}  // namespace edgelora::kernels
