// dequantize_row: w[k] of one row is in 4 bytes of every 64 of its panel. What is worked out 32
// values at a time the compiler makes vectors of; nf4, fp4 and float32 hold no embeddings outside
// tests.
#pragma once

#include "kernels/half.h"
#include "kernels/codebooks.h"
#include "kernels/panels.h"

namespace edgelora::kernels {
namespace {

// absmax is decoded into the front of `out` and used from the back, for want of scratch: value k
// needs out[k / step], which only value k / step ≤ k overwrites.
inline void codebook_row(const Weights& weights, int64_t row, float* out) {
  const int64_t r = row % kPanelRows, step = absmax_step(weights.in_features);
  const uint8_t* codes = panel_codes(weights, row / kPanelRows);
  const float* values = codebook(weights.format).values;
  decode_absmax_row(weights, row, 1.0f, out, 1);
  for (int64_t k = weights.in_features - 1; k >= 0; --k) {
    const uint8_t byte = codes[k / 8 * 64 + 4 * r + k % 4];
    out[k] = values[k % 8 < 4 ? byte & 15 : byte >> 4] * out[k / step];
  }
  round_values(weights.rounding, out, weights.in_features);
}

inline void float_row(const Weights& weights, int64_t row, float* out) {
  const uint8_t* panel = panel_codes(weights, row / kPanelRows);
  for (int64_t k = 0; k < weights.in_features; ++k) {
    out[k] = load_f32(panel, k * kPanelRows + row % kPanelRows);
  }
}

struct RowScale {
  float scale;
  float offset;
  int zero_point;
};

// block: of those that have a scale, within the row.
inline RowScale row_scale(const Weights& weights, int64_t row, int64_t block) {
  const int64_t stored = first_scale_block(weights, row / kPanelRows) + block;
  const int64_t r = row % kPanelRows, i = stored * kPanelRows + r;
  RowScale s{half_to_float(load_u16(weights.scales, i)), 0.0f, 0};
  if (weights.format == Format::kInt4) s.zero_point = 8;
  if (weights.format == Format::kInt4Offsets) {
    s.offset = weights.exact_offsets != nullptr ? load_f32(weights.exact_offsets, i)
                                                : half_to_float(load_u16(weights.zero_points, i));
  }
  if (weights.format == Format::kInt4ZeroPoints) {
    const int byte = static_cast<const uint8_t*>(weights.zero_points)[stored * 8 + r % 8];
    s.zero_point = r < 8 ? byte & 15 : byte >> 4;
  }
  return s;
}

// The 32 from b·32.
inline void row_codes(const Weights& weights, int64_t row, int64_t b, int* codes) {
  const uint8_t* bytes = panel_codes(weights, row / kPanelRows) + row % kPanelRows * 4;
  if (weights.format == Format::kInt8) {
    for (int k = 0; k < 32; ++k) {
      codes[k] = static_cast<int8_t>(bytes[(b * 8 + k / 4) * 64 + k % 4]);
    }
    return;
  }
  for (int k = 0; k < 32; ++k) {
    const uint8_t byte = bytes[(b * 4 + k / 8) * 64 + k % 4];
    codes[k] = k % 8 < 4 ? byte & 15 : byte >> 4;
  }
}

inline void integer_row(const Weights& weights, int64_t row, float* out) {
  const bool offsets = weights.format == Format::kInt4Offsets;
  for (int64_t k = 0; k < weights.in_features; k += kActivationBlock) {
    int codes[kActivationBlock];
    row_codes(weights, row, k / kActivationBlock, codes);
    const RowScale s = row_scale(weights, row, k / weights.block_size);
    const int64_t count = min_of(kActivationBlock, weights.in_features - k);
    for (int64_t i = 0; i < count; ++i) {
      const float product = s.scale * static_cast<float>(codes[i] - s.zero_point);
      out[k + i] = offsets ? product + s.offset : product;
    }
  }
}

inline void row_values(const Weights& weights, int64_t row, float* out) {
  if (has_codebook(weights.format)) return codebook_row(weights, row, out);
  if (weights.format == Format::kFloat) return float_row(weights, row, out);
  integer_row(weights, row, out);
}

}  // namespace
}  // namespace edgelora::kernels
