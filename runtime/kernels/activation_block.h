// Quantizing activations: groups of up to four blocks of 32, in the last one zeros behind the row.
//
//   scale = most / 127 · 2^−e      most: the group's largest amax; e = 0…24: the most for which
//                                  amax ≤ most · 2^−e
//   code = round_half_even(x · (127 / most · 2^e)),  sum = Σ code
//   amax < 2^-119 (its scale would be subnormal): as an all-zero block, scale 0, codes 0, sum 0
//   any NaN or Inf: scale NaN, codes 0, sum 0, so that every y it touches is NaN; the group's other
//   blocks are scaled without it
//
// That a group's scales are powers of two apart spares kernels a multiplication (panel_pairs.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/ceil_div.h"
#include "kernels/kernels.h"

namespace edgelora::kernels {
namespace {

constexpr float kSmallestAmax = 0x1p-119f;
constexpr float kLargestFinite = std::numeric_limits<float>::max();
constexpr int32_t kMostHalvings = 24;  // of a group's scale
constexpr int32_t kMantissaBits = 23;

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

inline bool is_usual(float amax) { return kSmallestAmax <= amax && amax <= kLargestFinite; }

inline int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float value_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// amax: of each block, NaN or Inf if it holds one.
inline void group_scales_of(const float* amax, int64_t blocks, BlockScale* scales) {
  float most = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) {
    if (is_usual(amax[b]) && amax[b] > most) most = amax[b];
  }
  const BlockScale top = block_scale_of(most, true);
  for (int64_t b = 0; b < blocks; ++b) {
    scales[b] = block_scale_of(amax[b], amax[b] <= kLargestFinite);
    if (!is_usual(amax[b])) continue;
    const int32_t e = (bits_of(most) - bits_of(amax[b])) >> kMantissaBits;
    const int32_t exponent = (e < kMostHalvings ? e : kMostHalvings) << kMantissaBits;
    scales[b].scale = value_of(bits_of(top.scale) - exponent);
    scales[b].inverse = value_of(bits_of(top.inverse) + exponent);
  }
}

// x [32 · blocks] → codes [32 · blocks], scales and sums [blocks]; the two functions: of one block.
template <float (*block_amax)(const float* x),
          int32_t (*encode_block)(const float* x, float inverse, int8_t* codes)>
void quantize_group(const float* x, int64_t blocks, int8_t* codes, float* scales, int32_t* sums) {
  float amax[kGroupBlocks];
  BlockScale of[kGroupBlocks];
  for (int64_t b = 0; b < blocks; ++b) amax[b] = block_amax(x + b * kActivationBlock);
  group_scales_of(amax, blocks, of);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t k = b * kActivationBlock;
    scales[b] = of[b].scale;
    sums[b] = encode_block(x + k, of[b].inverse, codes + k);
  }
}

// x [K] → codes [Kp], scales and sums [Kp / 32]
template <class QuantizeGroup>
void quantize_groups(const float* x, int64_t in_features, int8_t* codes, float* scales,
                     int32_t* sums, QuantizeGroup quantize) {
  constexpr int64_t kGroup = kGroupBlocks * kActivationBlock;
  for (int64_t k = 0; k < in_features; k += kGroup) {
    const int64_t count = in_features - k < kGroup ? in_features - k : kGroup;
    const int64_t blocks = ceil_div(count, kActivationBlock), b = k / kActivationBlock;
    if (count % kActivationBlock == 0) {
      quantize(x + k, blocks, codes + k, scales + b, sums + b);
      continue;
    }
    float padded[kGroup] = {};
    std::memcpy(padded, x + k, static_cast<size_t>(count) * sizeof(float));
    quantize(padded, blocks, codes + k, scales + b, sums + b);
  }
}

}  // namespace
}  // namespace edgelora::kernels
