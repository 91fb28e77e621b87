// dequantize_row where speed does not matter: nf4, fp4 and float32 weights (an embedding is
// neither, nor float32 outside tests).
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

}  // namespace
}  // namespace edgelora::kernels
