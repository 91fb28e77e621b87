// Loads, stores and sums that the files of all NEON folders share, unaligned to 1 byte; each folder
// compiles its own copy with its own flags.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "kernels/panels.h"

namespace edgelora::kernels {
namespace {

inline uint8x16_t load_bytes(const void* from) {
  return vld1q_u8(static_cast<const uint8_t*>(from));
}

inline float32x4_t load_float4(const void* from) { return vreinterpretq_f32_u8(load_bytes(from)); }

inline float32x4_t load_half4(const void* from) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(static_cast<const uint8_t*>(from))));
}

// 16 of them: the rows of a panel.
inline void load_half16(const uint16_t* from, float32x4_t out[4]) {
  const float16x8_t low = vreinterpretq_f16_u8(load_bytes(from));
  const float16x8_t high = vreinterpretq_f16_u8(load_bytes(from + 8));
  out[0] = vcvt_f32_f16(vget_low_f16(low));
  out[1] = vcvt_high_f32_f16(low);
  out[2] = vcvt_f32_f16(vget_low_f16(high));
  out[3] = vcvt_high_f32_f16(high);
}

inline void store_half16(const float* from, uint16_t* to) {
  for (int i = 0; i < 16; i += 4) {
    const float16x4_t halves = vcvt_f16_f32(load_float4(from + i));
    std::memcpy(to + i, &halves, sizeof halves);
  }
}

// y [rows ≤ 16] += added [16]
inline void add_to(const float32x4_t added[4], int64_t rows, float* y) {
  if (rows == kPanelRows) {
    for (int j = 0; j < 4; ++j) vst1q_f32(y + 4 * j, vaddq_f32(vld1q_f32(y + 4 * j), added[j]));
    return;
  }
  float some[kPanelRows];
  for (int j = 0; j < 4; ++j) vst1q_f32(some + 4 * j, added[j]);
  for (int64_t i = 0; i < rows; ++i) y[i] += some[i];
}

}  // namespace
}  // namespace edgelora::kernels
