// x as four_rows.h multiplies it: in groups of four rows, block by block.
//
// Isa::interleave puts a block's codes of four rows in its order, Isa::store_values a value of each
// row, kValues of them.
#pragma once

#include "kernels/neon/scales.h"

namespace edgelora::kernels {
namespace {

constexpr int64_t kGroupBytes = 4 * kActivationBlock;  // a block of a group

// A tile of rows of x; kValues (Isa) for a group: one of each row, or as Isa wants them.
struct GroupedRows {
  int64_t rows;         // that exist
  int64_t groups;       // ⌈rows / 4⌉
  const int8_t* codes;  // [blocks, groups, 128] in Isa's order
  const float* scales;  // [blocks, groups, kValues]
  const float* terms;   // [blocks, groups, kValues]; has_starts: where the sums start, as bits
                        // kFloatBits + zero_term; kInt4Offsets: scale · Σ codes
};

// Where the sums of the other formats start.
constexpr float kBias = 0x1.8p23f;  // kFloatBits
alignas(16) constexpr float kNoTerms[8] = {kBias, kBias, kBias, kBias, kBias, kBias, kBias, kBias};

constexpr bool has_starts(Format format) {
  return format == Format::kInt4 || has_codebook(format);
}

constexpr bool has_terms(Format format) {
  return has_starts(format) || format == Format::kInt4Offsets;
}

// Four rows of [M, row_values] from `row` on; the last row again for those beyond it, whose results
// nobody reads.
template <class T>
struct FourRows {
  const T* of[4];

  FourRows(const T* from, int64_t row, int64_t rows, int64_t row_values) {
    for (int64_t r = 0; r < 4; ++r) of[r] = from + min_of(row + r, rows - 1) * row_values;
  }
};

// Up to four values.
inline float32x4_t load_some(const float* from, int64_t count) {
  float four[4] = {};
  std::memcpy(four, from, static_cast<size_t>(count) * 4);
  return vld1q_f32(four);
}

inline int32x4_t load_some(const int32_t* from, int64_t count) {
  int32_t four[4] = {};
  std::memcpy(four, from, static_cast<size_t>(count) * 4);
  return vld1q_s32(four);
}

inline void transpose(float32x4_t rows[4]) {
  const float32x4x2_t a = vzipq_f32(rows[0], rows[2]), b = vzipq_f32(rows[1], rows[3]);
  const float32x4x2_t first = vzipq_f32(a.val[0], b.val[0]);
  const float32x4x2_t last = vzipq_f32(a.val[1], b.val[1]);
  rows[0] = first.val[0];
  rows[1] = first.val[1];
  rows[2] = last.val[0];
  rows[3] = last.val[1];
}

// values(r, b, count): of row r and `count` blocks from b on. to: of block 0; stride: floats.
template <class Isa, class Values>
void pack_values(const Values& values, int64_t blocks, float* to, int64_t stride) {
  for (int64_t b = 0; b < blocks; b += 4) {
    float32x4_t of[4];
    if (b + 4 <= blocks) {
      for (int r = 0; r < 4; ++r) of[r] = values(r, b, 4);
    } else {
      for (int r = 0; r < 4; ++r) of[r] = values(r, b, blocks - b);
    }
    transpose(of);
    for (int64_t i = 0; i < min_of(4, blocks - b); ++i) {
      Isa::store_values(of[i], to + (b + i) * stride);
    }
  }
}

template <class Isa>
void pack_group(const Weights& weights, const Activations& x, int64_t row, int64_t stride,
                int8_t* codes, float* scales, float* terms) {
  const int64_t blocks = activation_blocks(weights.in_features);
  const FourRows<int8_t> x_codes(x.codes, row, x.rows, blocks * kActivationBlock);
  const FourRows<float> x_scales(x.scales, row, x.rows, blocks);
  const FourRows<int32_t> sums(x.sums, row, x.rows, blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    Isa::interleave(x_codes.of, b * kActivationBlock, codes + b * stride * kGroupBytes);
  }
  const auto scale = [&](int r, int64_t b, int64_t count) {
    return load_some(x_scales.of[r] + b, count);
  };
  const auto sum = [&](int r, int64_t b, int64_t count) {
    return load_some(sums.of[r] + b, count);
  };
  const auto start = [&](int r, int64_t b, int64_t count) {
    const int32x4_t products = vmulq_n_s32(sum(r, b, count), neon_term_zero(weights.format));
    return vreinterpretq_f32_s32(vrsraq_n_s32(vdupq_n_s32(kFloatBits), products, 5));
  };
  const auto shift = [&](int r, int64_t b, int64_t count) {
    return vmulq_f32(scale(r, b, count), vcvtq_f32_s32(sum(r, b, count)));
  };
  pack_values<Isa>(scale, blocks, scales, stride * Isa::kValues);
  if (has_starts(weights.format)) {
    pack_values<Isa>(start, blocks, terms, stride * Isa::kValues);
  } else if (weights.format == Format::kInt4Offsets) {
    pack_values<Isa>(shift, blocks, terms, stride * Isa::kValues);
  }
}

template <class Isa>
GroupedRows pack_groups(const Weights& weights, const Activations& x, int64_t first_row,
                        void* scratch) {
  const ScratchLayout layout = scratch_layout(weights);
  auto* codes = reinterpret_cast<int8_t*>(at(scratch, layout.codes));
  auto* scales = reinterpret_cast<float*>(at(scratch, layout.scales));
  auto* terms = reinterpret_cast<float*>(at(scratch, layout.terms));
  GroupedRows tile{};
  tile.rows = min_of(kRowTile, x.rows - first_row);
  tile.groups = ceil_div(tile.rows, 4);
  tile.codes = codes;
  tile.scales = scales;
  tile.terms = terms;
  for (int64_t group = 0; group < tile.groups; ++group) {
    pack_group<Isa>(weights, x, first_row + group * 4, tile.groups, codes + group * kGroupBytes,
                    scales + group * Isa::kValues, terms + group * Isa::kValues);
  }
  return tile;
}

}  // namespace
}  // namespace edgelora::kernels
