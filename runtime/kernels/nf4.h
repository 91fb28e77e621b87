// NF4's sixteen values, and their bytes for the integer kernels.
#pragma once

#include <cstdint>

#include "kernels/half.h"
#include "kernels/kernels.h"

namespace edgelora::kernels {
namespace {

constexpr float kNf4Values[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// What `linear` multiplies instead of the values, which `linear_float` and `dequantize_row` use
// themselves. The scales are those at which the rounding of the values, weighted by how often each
// code occurs, is least.
//
// round(124.125·value), for products of signed or 8-bit unsigned bytes.
constexpr float kNf4ByteScale = 124.125f;
constexpr int8_t kNf4Bytes[16] = {-124, -86, -65, -49, -35, -23, -11, 0,
                                  10,   20,  31,  42,  55,  70,  90,  124};

// value ≈ (4·level − 255) / 250, for products whose pairs must fit into 16 bits: levels need seven.
constexpr float kNf4LevelScale = 250.0f;
alignas(16) constexpr uint8_t kNf4Levels[16] = {1,  20, 31, 39, 46, 52, 58, 64,
                                                69, 74, 79, 85, 91, 99, 109, 126};

inline void round_values(Rounding rounding, float* values, int64_t count) {
  if (rounding == Rounding::kBfloat16) {
    for (int64_t i = 0; i < count; ++i) values[i] = round_to_bfloat16(values[i]);
  } else if (rounding == Rounding::kFloat16) {
    for (int64_t i = 0; i < count; ++i) values[i] = half_to_float(float_to_half(values[i]));
  }
}

}  // namespace
}  // namespace edgelora::kernels
