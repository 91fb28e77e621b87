// Quantizing one block of activations: the scalar steps, also for the last, partial block
// elsewhere.
//
//   scale = amax / 127,  code = round_half_even(x · (127 / amax)),  sum = Σ code
//   amax < 2^-119 (its scale would be subnormal): as an all-zero block, scale 0, codes 0, sum 0
//   any NaN or Inf: scale NaN, codes 0, sum 0, so that every y it touches is NaN
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/kernels.h"

namespace edgelora::kernels {
namespace {

constexpr float kSmallestAmax = 0x1p-119f;
constexpr float kLargestFinite = std::numeric_limits<float>::max();

// Of |value| < 2^22: what is added and taken away leaves no bits behind the point.
inline float round_half_even(float value) { return value + 0x1.8p23f - 0x1.8p23f; }

struct BlockScale {
  float scale;    // stored
  float inverse;  // multiplies x; 0 where codes are all zero
};

inline BlockScale block_scale_of(float amax, bool finite) {
  if (!finite) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  if (amax < kSmallestAmax) return {0.0f, 0.0f};
  return {amax / 127.0f, 127.0f / amax};
}

// x [count] → codes [kActivationBlock], the rest zero; returns the sum.
inline int32_t quantize_block(const float* x, int64_t count, int8_t* codes, float* scale) {
  float amax = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(x[i]);
    finite = finite && magnitude <= kLargestFinite;
    if (magnitude > amax) amax = magnitude;
  }
  const BlockScale block = block_scale_of(amax, finite);
  *scale = block.scale;
  int32_t sum = 0;
  for (int64_t i = 0; i < kActivationBlock; ++i) {
    const bool zero = i >= count || block.inverse == 0.0f;
    codes[i] = zero ? int8_t{0} : static_cast<int8_t>(std::nearbyintf(x[i] * block.inverse));
    sum += codes[i];
  }
  return sum;
}

// A row, with a function for full blocks.
template <int32_t (*quantize_full_block)(const float* x, int8_t* codes, float* scale)>
void quantize_blocks(const float* x, int64_t in_features, int8_t* codes, float* scales,
                     int32_t* sums) {
  const int64_t full = in_features / kActivationBlock, k = full * kActivationBlock;
  for (int64_t b = 0; b < full; ++b) {
    const int64_t at = b * kActivationBlock;
    sums[b] = quantize_full_block(x + at, codes + at, scales + b);
  }
  if (k < in_features) {
    sums[full] = quantize_block(x + k, in_features - k, codes + k, scales + full);
  }
}

}  // namespace
}  // namespace edgelora::kernels
