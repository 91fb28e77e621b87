// What the int8 side branches of the NEON folders share; each compiles its own copy with its own
// flags.
//
// b of a panel: 16 scales, then four columns r at a time, 64 bytes, four registers:
//     │ row 0: r … r+3 │ row 1: r … r+3 │ row 2 │ row 3 │
#pragma once

#include "kernels/neon/registers.h"
#include "kernels/packed_factors.h"

namespace edgelora::kernels {
namespace {

// Four codes of t, for each of four rows of b.
inline int8x16_t broadcast_quad(const int8_t* t) {
  int32_t quad;
  std::memcpy(&quad, t, sizeof quad);
  return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

inline int8x16_t load_column(const uint8_t* b) { return vreinterpretq_s8_u8(load_bytes(b)); }

// y [columns ≤ 16] += factor · scales · sums
inline void add_scaled(const int32x4_t sums[4], const uint8_t* scales, float factor,
                       int64_t columns, float* y) {
  float32x4_t added[4];
  for (int j = 0; j < 4; ++j) {
    added[j] = vmulq_n_f32(vmulq_f32(vcvtq_f32_s32(sums[j]), load_half4(scales + 8 * j)), factor);
  }
  add_to(added, columns, y);
}

}  // namespace
}  // namespace edgelora::kernels
