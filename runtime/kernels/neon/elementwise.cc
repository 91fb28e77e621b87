// Activations → int8 blocks, embedding rows and SwiGLU.
//
//   code = round_half_even(x · (127 / amax)) of 32 values, eight registers; activation_block.h
//   w[k] of one row: 4 bytes of every 64 of its panel
//   out = gate / (1 + e^−gate) · up
//   e^x = 2^n · p(r), n = round(x / ln 2), r = x − n·ln 2 in two parts; p: Taylor's to r^7/5040, at
//   |r| ≤ 0.347 truncated by 5e-9 of the value: the error is float32's own rounding (≤ 2 ulp).
#include <cmath>

#include "kernels/activation_block.h"
#include "kernels/half.h"
#include "kernels/neon/neon.h"
#include "kernels/neon/registers.h"
#include "kernels/row_values.h"

namespace edgelora::kernels::neon {
namespace {

constexpr float kExpOverflow = 88.72f;  // e^x is Inf above
constexpr float kExpLowest = -87.0f;    // e^x < 2e-38 below, nothing beside 1
constexpr float kInverseFactorials[] = {1.0f,      1.0f,       0.5f,       1.0f / 6,
                                        1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};

int8x16_t round_16(const float32x4_t* v, float inverse) {
  int32x4_t words[4];
  for (int i = 0; i < 4; ++i) words[i] = vcvtnq_s32_f32(vmulq_n_f32(v[i], inverse));
  const int16x8_t low = vqmovn_high_s32(vqmovn_s32(words[0]), words[1]);
  const int16x8_t high = vqmovn_high_s32(vqmovn_s32(words[2]), words[3]);
  return vqmovn_high_s16(vqmovn_s16(low), high);
}

// A NaN passes through vmaxq; Inf · 0 becomes NaN, and a NaN's integer is 0.
int32_t quantize_full_block(const float* x, int8_t* codes, float* scale) {
  float32x4_t v[8];
  float32x4_t amax = vdupq_n_f32(0.0f);
  for (int i = 0; i < 8; ++i) {
    v[i] = vld1q_f32(x + 4 * i);
    amax = vmaxq_f32(amax, vabsq_f32(v[i]));
  }
  const float largest = vmaxvq_f32(amax);
  const BlockScale block = block_scale_of(largest, largest <= kLargestFinite);
  *scale = block.scale;
  const int8x16_t low = round_16(v, block.inverse), high = round_16(v + 4, block.inverse);
  vst1q_s8(codes, low);
  vst1q_s8(codes + 16, high);
  return vaddlvq_s16(vpadalq_s8(vpaddlq_s8(low), high));
}

// NaN stays NaN: in minimum, maximum and the polynomial.
float32x4_t exp4(float32x4_t x) {
  const float32x4_t bounded =
      vmaxq_f32(vdupq_n_f32(kExpLowest), vminq_f32(vdupq_n_f32(kExpOverflow), x));
  const float32x4_t n = vrndnq_f32(vmulq_n_f32(bounded, 1.44269504f));
  float32x4_t r = vfmaq_n_f32(bounded, n, -0.693359375f);  // 355/512: n times it is exact
  r = vfmaq_n_f32(r, n, 2.12194440e-4f);
  float32x4_t p = vdupq_n_f32(kInverseFactorials[7]);
  for (int i = 6; i >= 0; --i) p = vfmaq_f32(vdupq_n_f32(kInverseFactorials[i]), p, r);
  // 2^n in two factors: n reaches 128, which no exponent field holds.
  const int32x4_t whole = vcvtnq_s32_f32(n);
  const int32x4_t half = vshrq_n_s32(whole, 1);
  const int32x4_t bias = vdupq_n_s32(127);
  const int32x4_t first = vshlq_n_s32(vaddq_s32(half, bias), 23);
  const int32x4_t second = vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23);
  const float32x4_t value =
      vmulq_f32(vmulq_f32(p, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second));
  return vbslq_f32(vcgtq_f32(x, vdupq_n_f32(kExpOverflow)), vdupq_n_f32(HUGE_VALF), value);
}

float32x4_t swiglu4(float32x4_t gate, float32x4_t up) {
  const float32x4_t divisor = vaddq_f32(vdupq_n_f32(1.0f), exp4(vnegq_f32(gate)));
  return vmulq_f32(vdivq_f32(gate, divisor), up);
}

uint32x4_t row_bytes(const uint8_t* from) {  // 4 of them, a lane each
  uint32_t word;
  std::memcpy(&word, from, sizeof word);
  return vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(word)))));
}

struct RowScale {
  float scale;
  float offset;
  int zero_point;
};

RowScale row_scale(const Weights& weights, int64_t row, int64_t block_in_panel) {
  const int64_t block = first_scale_block(weights, row / kPanelRows) + block_in_panel;
  const int64_t r = row % kPanelRows, i = block * kPanelRows + r;
  RowScale s{half_to_float(load_u16(weights.scales, i)), 0.0f, 0};
  if (weights.format == Format::kInt4) s.zero_point = 8;
  if (weights.format == Format::kInt4Offsets) {
    s.offset = weights.exact_offsets != nullptr
                   ? load_f32(weights.exact_offsets, i)
                   : half_to_float(load_u16(weights.zero_points, i));
  }
  if (weights.format == Format::kInt4ZeroPoints) {
    const int byte = static_cast<const uint8_t*>(weights.zero_points)[block * 8 + r % 8];
    s.zero_point = r < 8 ? byte & 15 : byte >> 4;
  }
  return s;
}

// Codes of the 32 K from b·32, as int32 in eight registers.
struct RowBlock {
  int32x4_t of[8];
};

RowBlock row_block(const Weights& weights, int64_t row, int64_t b) {
  const uint8_t* codes = panel_codes(weights, row / kPanelRows) + row % kPanelRows * 4;
  RowBlock out;
  if (weights.format == Format::kInt8) {
    for (int q = 0; q < 8; ++q) {  // the sign is bit 7
      const uint32x4_t top = vshlq_n_u32(row_bytes(codes + (b * 8 + q) * 64), 24);
      out.of[q] = vshrq_n_s32(vreinterpretq_s32_u32(top), 24);
    }
    return out;
  }
  for (int q = 0; q < 4; ++q) {
    const uint32x4_t bytes = row_bytes(codes + (b * 4 + q) * 64);
    out.of[2 * q] = vreinterpretq_s32_u32(vandq_u32(bytes, vdupq_n_u32(15)));
    out.of[2 * q + 1] = vreinterpretq_s32_u32(vshrq_n_u32(bytes, 4));
  }
  return out;
}

void dequantize_block(const RowBlock& codes, const RowScale& s, Format format, float* out) {
  for (int q = 0; q < 8; ++q) {
    const int32x4_t integers = vsubq_s32(codes.of[q], vdupq_n_s32(s.zero_point));
    const float32x4_t product = vmulq_n_f32(vcvtq_f32_s32(integers), s.scale);
    vst1q_f32(out + 4 * q, format == Format::kInt4Offsets
                               ? vaddq_f32(product, vdupq_n_f32(s.offset))
                               : product);
  }
}

}  // namespace

void quantize_activations(const float* x, int64_t in_features, int8_t* codes, float* scales,
                          int32_t* sums) {
  const int64_t full = in_features / kActivationBlock;
  for (int64_t b = 0; b < full; ++b) {
    const int64_t k = b * kActivationBlock;
    sums[b] = quantize_full_block(x + k, codes + k, scales + b);
  }
  const int64_t k = full * kActivationBlock;
  if (k < in_features) {
    sums[full] = quantize_block(x + k, in_features - k, codes + k, scales + full);
  }
}

void dequantize_row(const Weights& weights, int64_t row, float* out) {
  if (has_codebook(weights.format)) return codebook_row(weights, row, out);
  if (weights.format == Format::kFloat) return float_row(weights, row, out);
  for (int64_t k = 0; k < weights.in_features; k += kActivationBlock) {
    const RowBlock codes = row_block(weights, row, k / kActivationBlock);
    const RowScale scale = row_scale(weights, row, k / weights.block_size);
    const int64_t count = min_of(kActivationBlock, weights.in_features - k);
    if (count == kActivationBlock) {
      dequantize_block(codes, scale, weights.format, out + k);
    } else {
      float last[kActivationBlock];
      dequantize_block(codes, scale, weights.format, last);
      std::memcpy(out + k, last, static_cast<size_t>(count) * sizeof(float));
    }
  }
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + 4 <= n; i += 4) {
    vst1q_f32(out + i, swiglu4(vld1q_f32(gate + i), vld1q_f32(up + i)));
  }
  if (i == n) return;
  float last[3][4] = {};
  const size_t bytes = static_cast<size_t>(n - i) * sizeof(float);
  std::memcpy(last[0], gate + i, bytes);
  std::memcpy(last[1], up + i, bytes);
  vst1q_f32(last[2], swiglu4(vld1q_f32(last[0]), vld1q_f32(last[1])));
  std::memcpy(out + i, last[2], bytes);
}

}  // namespace edgelora::kernels::neon
