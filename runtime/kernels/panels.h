// Where things lie in the packed layouts (drawn in ARCHITECTURE.md), for the kernels of every ISA.
//
// Everything here is in an anonymous namespace: each file gets its own copy, compiled with its own
// flags, so that the linker can never hand one ISA's code to another.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/ceil_div.h"
#include "kernels/kernels.h"

// For the steps of an inner loop: arrays of registers that are handed on stay registers only when
// the step is inlined.
#define EDGELORA_INLINE __attribute__((always_inline)) inline

namespace edgelora::kernels {
namespace {

constexpr int64_t kAbsmaxBlock = 64;     // flattened weights that share an absmax
constexpr int64_t kAbsmaxGroup = 256;    // absmax codes that share a nested absmax
constexpr int64_t kStripRows = 32;    // rows of activations that a thread takes through its panels
// Rows rearranged together: a strip may have half as many more.
constexpr int64_t kRowTile = 48;
constexpr int64_t kWideRows = 128;    // the same of amx_bf16
constexpr int64_t kFloatStrip = 128;  // K values of a panel dequantized at a time (exact path)

constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t activation_blocks(int64_t in_features) {
  return ceil_div(in_features, kActivationBlock);
}

inline int64_t activation_groups(int64_t in_features) {
  return ceil_div(in_features, kGroupBlocks * kActivationBlock);
}

inline int64_t panel_rows(const Weights& weights, int64_t panel) {  // rows that exist, 1…16
  return min_of(kPanelRows, weights.out_features - panel * kPanelRows);
}

// Codes of one panel, bytes.
inline int64_t panel_code_bytes(const Weights& weights) {
  const int64_t padded = activation_blocks(weights.in_features) * kActivationBlock;
  switch (weights.format) {
    case Format::kFloat:
      return weights.in_features * kPanelRows * 4;
    case Format::kInt8:
      return padded * kPanelRows;
    default:
      return padded * kPanelRows / 2;
  }
}

inline const uint8_t* panel_codes(const Weights& weights, int64_t panel) {
  return static_cast<const uint8_t*>(weights.codes) +
         panel * (weights.panel_stride != 0 ? weights.panel_stride : panel_code_bytes(weights));
}

// nf4, fp4: K values that share one decoded absmax row. Blocks of 64 start anew in each row only
// when 64 divides K; else a row may start in the middle of one, and 32 is what divides both.
inline int64_t absmax_step(int64_t in_features) {
  return in_features % kAbsmaxBlock == 0 ? 64 : 32;
}

inline int64_t scale_block_size(const Weights& weights) {
  return has_codebook(weights.format) ? absmax_step(weights.in_features) : weights.block_size;
}

inline int64_t scale_blocks(const Weights& weights) {
  return ceil_div(weights.in_features, scale_block_size(weights));
}

// The first block of a panel's scales, zero points and offsets.
inline int64_t first_scale_block(const Weights& weights, int64_t panel) {
  return panel * (weights.block_stride != 0 ? weights.block_stride : scale_blocks(weights));
}

// Rows of the slice that a panel belongs to, and where that slice's absmax starts.
struct AbsmaxSlice {
  int64_t first_row;    // of the slice
  int64_t first_block;  // of the slice in absmax, a multiple of 256
  float offset;
};

inline AbsmaxSlice absmax_slice(const Weights& weights, int64_t row) {
  const bool plain = weights.absmax == nullptr;
  AbsmaxSlice slice{0, 0, plain ? 0.0f : weights.absmax_offset[0]};
  for (int64_t i = 0; i + 1 < weights.slice_count; ++i) {
    if (row < slice.first_row + weights.slices[i]) break;
    const int64_t blocks = ceil_div(weights.slices[i] * weights.in_features, kAbsmaxBlock);
    slice.first_row += weights.slices[i];
    slice.first_block += ceil_div(blocks, kAbsmaxGroup) * kAbsmaxGroup;
    if (!plain) slice.offset = weights.absmax_offset[i + 1];
  }
  return slice;
}

// factor · absmax of one row, one for each absmax_step of K, to out[0], out[stride], …
inline void decode_absmax_row(const Weights& weights, int64_t row, float factor, float* out,
                              int64_t stride) {
  const AbsmaxSlice slice = absmax_slice(weights, row);
  const float* table = weights.absmax_table;
  const int64_t step = absmax_step(weights.in_features);
  const int64_t halves =
      kAbsmaxBlock / step;  // steps in a block: 1, or 2 where a row may start in one
  const int64_t end = weights.in_features / step;
  int64_t at = (row - slice.first_row) * weights.in_features / step;  // steps before, in the slice
  if (weights.absmax == nullptr) {
    const float* plain = weights.nested_absmax + slice.first_block;
    for (int64_t i = 0; i < end; ++i) out[i * stride] = plain[(at + i) / halves] * factor;
    return;
  }
  for (int64_t i = 0; i < end;) {
    const int64_t group = (slice.first_block + at / halves) / kAbsmaxGroup;
    const float nested = weights.nested_absmax[group];
    const int64_t group_end = ((group + 1) * kAbsmaxGroup - slice.first_block) * halves;
    const int64_t count = min_of(end - i, group_end - at);
    const uint8_t* codes = weights.absmax + slice.first_block;
    float* to = out + i * stride;
#pragma GCC unroll 4
    for (int64_t j = 0; j < count; ++j) {
      const uint8_t code = halves == 1 ? codes[at + j] : codes[(at + j) >> 1];
      to[j * stride] = (table[code] * nested + slice.offset) * factor;
    }
    i += count;
    at += count;
  }
}

// table[code] of a full panel whose rows are whole blocks, [K / 64, 16]. As integers, one by one: a
// compiler would make gathers of it, which are slower than three instructions on many CPUs.
inline void look_up_absmax(const Weights& weights, const uint8_t* codes, int64_t blocks,
                           float* out) {
  for (int64_t i = 0; i < blocks; ++i) {
#pragma GCC unroll 16
    for (int64_t r = 0; r < kPanelRows; ++r) {
      std::memcpy(out + i * kPanelRows + r, weights.absmax_table + codes[r * blocks + i], 4);
    }
  }
}

// decode_absmax_panel for such a panel: between two changes of any row's nested absmax, 16 rows are
// one vector.
inline void decode_full_absmax_panel(const Weights& weights, int64_t panel, float factor,
                                     float* out) {
  const int64_t blocks = weights.in_features / kAbsmaxBlock;  // of a row
  const AbsmaxSlice slice = absmax_slice(weights, panel * kPanelRows);
  const int64_t first =
      slice.first_block + (panel * kPanelRows - slice.first_row) * blocks;  // of the panel
  look_up_absmax(weights, weights.absmax + first, blocks, out);
  for (int64_t i = 0; i < blocks;) {
    float nested[kPanelRows];
    int64_t end = blocks;
    for (int64_t r = 0; r < kPanelRows; ++r) {
      const int64_t row = first + r * blocks, group = (row + i) / kAbsmaxGroup;
      nested[r] = weights.nested_absmax[group];
      end = min_of(end, (group + 1) * kAbsmaxGroup - row);
    }
    for (; i < end; ++i) {
      float* to = out + i * kPanelRows;
      for (int64_t r = 0; r < kPanelRows; ++r) {
        to[r] = (to[r] * nested[r] + slice.offset) * factor;
      }
    }
  }
}

// factor · absmax of a panel as float [K / absmax_step, 16]; rows beyond N get 0.
inline void decode_absmax_panel(const Weights& weights, int64_t panel, float factor, float* out) {
  const int64_t rows = panel_rows(weights, panel);
  if (rows == kPanelRows && weights.in_features % kAbsmaxBlock == 0 && weights.absmax != nullptr) {
    return decode_full_absmax_panel(weights, panel, factor, out);
  }
  for (int64_t r = 0; r < rows; ++r) {
    decode_absmax_row(weights, panel * kPanelRows + r, factor, out + r, kPanelRows);
  }
  for (int64_t i = 0; i < scale_blocks(weights) && rows < kPanelRows; ++i) {
    for (int64_t r = rows; r < kPanelRows; ++r) out[i * kPanelRows + r] = 0.0f;
  }
}

}  // namespace
}  // namespace edgelora::kernels
