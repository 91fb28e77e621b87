// What `linear_float` does around one ISA's steps:
//
//   for each tile of up to kRowTile rows, each panel, each strip of kFloatStrip values of K
//     Isa::dequantize_strip   strip [128, 16] float32, exactly edgelora/quantize's values
//     Isa::add_strip          total [rows, 16] double += the strip's float32 sums
//
// Sums of 128 products in float32, their totals in double: close to a float64 sum at float32's
// speed.
#pragma once

#include "kernels/codebooks.h"
#include "kernels/scratch.h"

namespace edgelora::kernels {
namespace {

// One strip of a panel: K values [begin, begin + count) of it.
struct Strip {
  int64_t begin;
  int64_t count;  // ≤ kFloatStrip
};

inline void store_totals(const double* totals, int64_t rows, int64_t columns, float* y,
                         int64_t y_stride) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t i = 0; i < columns; ++i) {
      y[m * y_stride + i] = static_cast<float>(totals[m * kPanelRows + i]);
    }
  }
}

// absmax, if any, is [K / absmax_step, 16]; the strip of kFloat is used in place.
template <class Isa>
void float_panel(const Weights& weights, const float* x, int64_t rows, int64_t panel,
                 const float* absmax, float* strip_memory, double* totals) {
  for (int64_t k = 0; k < weights.in_features; k += kFloatStrip) {
    const Strip strip{k, min_of(kFloatStrip, weights.in_features - k)};
    const void* values = strip_memory;
    if (weights.format == Format::kFloat) {
      values = panel_codes(weights, panel) + k * kPanelRows * 4;
    } else {
      Isa::dequantize_strip(weights, panel, strip, absmax, strip_memory);
      round_values(weights.rounding, strip_memory, strip.count * kPanelRows);
    }
    for (int64_t m = 0; m < rows; ++m) {
      Isa::add_strip(values, x + m * weights.in_features + k, strip.count, totals + m * kPanelRows);
    }
  }
}

template <class Isa>
void drive_linear_float(const Weights& weights, const float* x, int64_t rows, int64_t panel_begin,
                        int64_t panel_end, float* y, int64_t y_stride, void* scratch) {
  const ScratchLayout layout = scratch_layout(weights);
  auto* strip = reinterpret_cast<float*>(static_cast<char*>(scratch) + layout.strip);
  auto* absmax = reinterpret_cast<float*>(static_cast<char*>(scratch) + layout.absmax);
  alignas(64) double totals[kRowTile * kPanelRows];
  for (int64_t m = 0; m < rows; m += kRowTile) {
    const int64_t count = min_of(kRowTile, rows - m);
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      for (double& total : totals) total = 0.0;
      if (has_codebook(weights.format)) decode_absmax_panel(weights, p, 1.0f, absmax);
      float_panel<Isa>(weights, x + m * weights.in_features, count, p, absmax, strip, totals);
      store_totals(totals, count, panel_rows(weights, p), y + m * y_stride + p * kPanelRows,
                   y_stride);
    }
  }
}

}  // namespace
}  // namespace edgelora::kernels
