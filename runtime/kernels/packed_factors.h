// How PackedFactors and PackedT lie: drawn in kernels.h.
#pragma once

#include "kernels/half.h"
#include "kernels/panels.h"

namespace edgelora::kernels {
namespace {

// A panel of b: its 16 scales, then its codes.
inline const uint8_t* packed_panel(const PackedFactors& factors, int64_t panel) {
  return factors.b + panel * 32 * (1 + ceil_div(factors.rank, 2));
}

inline float packed_scale(const PackedT& t, int64_t row) { return t.data[row * t.stride]; }

inline const int16_t* packed_codes(const PackedT& t, int64_t row) {
  return reinterpret_cast<const int16_t*>(t.data + row * t.stride + 1);
}

}  // namespace
}  // namespace edgelora::kernels
