// The sixteen values of NF4 and FP4, and their bytes for the integer kernels.
#pragma once

#include <cstdint>

#include "kernels/half.h"
#include "kernels/panels.h"

namespace edgelora::kernels {
namespace {

// `linear` multiplies bytes or levels instead of the values, which `linear_float` and
// `dequantize_row` use themselves. Scales and zeros are those at which the rounding of the values,
// weighted by how often each code occurs, is least.
struct Codebook {
  float values[16];
  // value ≈ (byte − byte_zero / 32) / byte_scale, for products of signed or 8-bit unsigned bytes.
  float byte_scale;
  int byte_zero;
  int8_t bytes[16];
  // value ≈ (4·level − level_offset) / level_scale, for products whose pairs must fit into 16 bits:
  // levels need seven.
  float level_scale;
  int level_offset;  // 255 or 256
  uint8_t levels[16];
};

constexpr Codebook kNf4Codebook = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    124.125f,
    5,
    {-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124},
    250.0f,
    255,
    {1, 20, 31, 39, 46, 52, 58, 64, 69, 74, 79, 85, 91, 99, 109, 126},
};

// Multiples of 1/12, but for the least: bytes and levels are exact for all others.
constexpr Codebook kFp4Codebook = {
    {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 0.5f, 2.0f / 12, 0.25f, -0.0f, -0.0625f / 12,
     -8.0f / 12, -1.0f, -4.0f / 12, -0.5f, -2.0f / 12, -0.25f},
    120.0f,
    0,
    {0, 1, 80, 120, 40, 60, 20, 30, 0, -1, -80, -120, -40, -60, -20, -30},
    240.0f,
    256,
    {64, 64, 104, 124, 84, 94, 74, 79, 64, 64, 24, 4, 44, 34, 54, 49},
};

constexpr const Codebook& codebook(Format format) {
  return format == Format::kFp4 ? kFp4Codebook : kNf4Codebook;
}

inline void round_values(Rounding rounding, float* values, int64_t count) {
  if (rounding == Rounding::kBfloat16) {
    for (int64_t i = 0; i < count; ++i) values[i] = round_to_bfloat16(values[i]);
  } else if (rounding == Rounding::kFloat16) {
    for (int64_t i = 0; i < count; ++i) values[i] = half_to_float(float_to_half(values[i]));
  }
}

}  // namespace
}  // namespace edgelora::kernels
