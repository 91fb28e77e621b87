// Several rows of x, for neon_dotprod and neon_i8mm: groups of four rows (grouped_rows.h) times
// four rows of W.
//
//   for each chunk of K
//     for each 16 rows of x (at the end 8, 4)     acc of these rows stays in L1 …
//       for each four rows of W
//         for each block of 32 K                  … and here in registers
//           codes → bytes in eight registers, for all these rows of x
//           for each group: Isa::multiply         acc += float(dot) · xscale · scale, of which
//                                                 Isa::kRounded is rounded first
//
// int4: codes 0 … 15 as they are, the sum starts at −8·Σx. Zero points: codes less theirs.
// int8: bytes as they are.
// nf4, fp4: a byte table, tbl, gives w = round(124.125·value); the sum starts at −5/32·Σx, which
//   the bytes are too large by on average. The rounding costs at most 0.0024 of absmax a weight.
//
// The 32 registers: acc 16, bytes of W 8, sums 4; the rest x, the scales of W and what
// float_of_biased takes away.
#pragma once

#include "kernels/neon/grouped_rows.h"
#include "kernels/neon/one_row.h"

namespace edgelora::kernels {
namespace {

constexpr int64_t kGroupFloats = 4 * kPanelRows;  // of acc
constexpr int64_t kChunkBlocks = 16;              // x of 16 rows: 8 KB

// Four bytes of the zero point of each row 4g … 4g + 3.
inline int8x16_t quarter_zero_points(const uint8_t* zero_points, int g) {
  uint32_t packed;  // low nibbles are rows of the panel's first half
  std::memcpy(&packed, zero_points + g % 2 * 4, 4);
  const uint8x16_t bytes = vreinterpretq_u8_u32(vdupq_n_u32(packed >> (g / 2 * 4)));
  const uint8x16_t two = vzip1q_u8(bytes, bytes);
  return vreinterpretq_s8_u8(vandq_u8(vzip1q_u8(two, two), vdupq_n_u8(15)));
}

// The compiler does not know what is there, and has to load it where it is used.
inline const int8_t* hidden(const int8_t* from) {
  asm volatile("" : "+r"(from));
  return from;
}

// A block's bytes of rows 4g … 4g + 3.
template <Format kFormat>
EDGELORA_INLINE void load_quarter(const uint8_t* block, const uint8_t* zero_points, int g,
                                  int8x16_t out[8]) {
  Unpacking by = unpacking<kFormat>();  // anew for each block: no register is left for it
  asm volatile("" : "+w"(by.nibble));
  if constexpr (has_codebook(kFormat)) by.codebook = vld1q_s8(hidden(codebook(kFormat).bytes));
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const Codes codes = load_codes<kFormat>(block, q, g, by);
    out[2 * q] = codes.low;
    out[2 * q + 1] = codes.high;
  }
  if constexpr (kFormat == Format::kInt4ZeroPoints) {
    const int8x16_t zero_point = quarter_zero_points(zero_points, g);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) out[i] = vsubq_s8(out[i], zero_point);
  }
}

template <class Isa, Format kFormat, int kGroup, int kGroups>
EDGELORA_INLINE void multiply_groups(const int8x16_t w[8], const int8_t* codes, const float* starts,
                                     const float* scales, typename Isa::Scale scale,
                                     typename Isa::Bias bias, float32x4_t acc[kGroups][4]) {
  if constexpr (kGroup < kGroups) {
    constexpr int kStart = has_starts(kFormat) ? kGroup : 0;
    Isa::template multiply<kGroup, kStart>(w, codes, starts, scales, scale, bias, acc[kGroup]);
    multiply_groups<Isa, kFormat, kGroup + 1, kGroups>(w, codes, starts, scales, scale, bias, acc);
  }
}

// Blocks begin … end of kGroups groups from `group` on; acc [kGroups][4 g][4][4].
template <class Isa, Format kFormat, int kGroups>
void add_blocks(PanelView w, int g, GroupedRows x, int64_t group, int64_t begin, int64_t end,
                float* acc) {
  float32x4_t sums[kGroups][4];
#pragma GCC unroll 16
  for (int i = 0; i < kGroups * 4; ++i) {
    sums[i / 4][i % 4] = vld1q_f32(acc + i / 4 * kGroupFloats + i % 4 * 4);
  }
  const auto bias = Isa::bias();
  const int64_t first = begin * x.groups + group;
  x.codes += first * kGroupBytes;
  x.scales += first * Isa::kValues;
  if constexpr (has_terms(kFormat)) x.terms += first * Isa::kValues;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t scale_block = b >> w.shift;
    if constexpr (kFormat == Format::kInt4Offsets) {
      const auto offset = Isa::widen(load_half4(w.offsets + scale_block * 16 + g * 4));
#pragma GCC unroll 4
      for (int i = 0; i < kGroups; ++i) {
        Isa::add_products(offset, x.terms + i * Isa::kValues, sums[i]);
      }
    }
    int8x16_t bytes[8];
    const uint8_t* zero_points =
        kFormat == Format::kInt4ZeroPoints ? w.zero_points + scale_block * 8 : nullptr;
    load_quarter<kFormat>(block_codes<kFormat>(w.codes, b), zero_points, g, bytes);
    Isa::arrange(bytes);
    const auto scale = Isa::widen(load_half4(w.scales + scale_block * 16 + g * 4));
    multiply_groups<Isa, kFormat, 0, kGroups>(
        bytes, x.codes, has_starts(kFormat) ? x.terms : kNoTerms, x.scales, scale, bias, sums);
    x.codes += x.groups * kGroupBytes;
    x.scales += x.groups * Isa::kValues;
    if constexpr (has_terms(kFormat)) x.terms += x.groups * Isa::kValues;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kGroups * 4; ++i) {
    vst1q_f32(acc + i / 4 * kGroupFloats + i % 4 * 4, sums[i / 4][i % 4]);
  }
}

template <class Isa, Format kFormat, int kGroups>
void add_panel(const PanelView& panel, const GroupedRows& x, int64_t group, int64_t begin,
               int64_t end, float* acc) {
  for (int g = 0; g < 4; ++g) {
    add_blocks<Isa, kFormat, kGroups>(panel, g, x, group, begin, end,
                                      acc + group * kGroupFloats + g * 16);
  }
}

template <class Isa, Format kFormat>
void panel_of_groups(const PanelView& panel, const GroupedRows& x, float* acc) {
  for (int64_t i = 0; i < x.groups * kGroupFloats; ++i) acc[i] = 0.0f;
  for (int64_t begin = 0; begin < panel.blocks; begin += kChunkBlocks) {
    const int64_t end = min_of(begin + kChunkBlocks, panel.blocks);
    int64_t group = 0;
    for (; group + 4 <= x.groups; group += 4) {
      add_panel<Isa, kFormat, 4>(panel, x, group, begin, end, acc);
    }
    for (; group + 2 <= x.groups; group += 2) {
      add_panel<Isa, kFormat, 2>(panel, x, group, begin, end, acc);
    }
    if (group < x.groups) add_panel<Isa, kFormat, 1>(panel, x, group, begin, end, acc);
  }
  for (int64_t group = 0; group < x.groups; ++group) Isa::in_rows(acc + group * kGroupFloats);
}

// ---- all together -----------------------------------------------------------------------------

constexpr int64_t kSeparateRows = 2;  // at most: each alone costs less than four together

struct SeparateRows {
  int64_t rows;
  RowTile of[kSeparateRows];
};

inline SeparateRows separate_rows(const Weights& weights, Activations x, int64_t first_row,
                                  void* scratch) {
  SeparateRows tile{x.rows - first_row, {}};
  for (int64_t r = 0; r < tile.rows; ++r) {
    x.rows = first_row + r + 1;
    void* own = at(scratch, r * activation_blocks(weights.in_features) * 4);  // for its terms
    tile.of[r] = pack_rows(weights, x, first_row + r, neon_term_zero(weights.format), own);
  }
  return tile;
}

// The two kinds of tiles, for Isas to inherit.
template <class Isa, class OneRow>
struct FewOrGroupedRows {
  using Rows = GroupedRows;

  template <Format kFormat>
  static void panel(const PanelView& view, const RowTile& x, float* acc) {
    one_row<OneRow, kFormat, Isa::kRounded>(view, x, acc);
  }
  template <Format kFormat>
  static void panel(const PanelView& view, const SeparateRows& x, float* acc) {
    for (int64_t r = 0; r < x.rows; ++r) panel<kFormat>(view, x.of[r], acc + r * kPanelRows);
  }
  template <Format kFormat>
  static void panel(const PanelView& view, const GroupedRows& x, float* acc) {
    panel_of_groups<Isa, kFormat>(view, x, acc);
  }
};

template <class Isa>
void drive_groups(const Weights& weights, const Activations& x, int64_t panel_begin,
                  int64_t panel_end, float* y, int64_t y_stride, void* scratch) {
  assert(weights.format != Format::kFloat);
  for (int64_t m = 0; m < x.rows; m += kRowTile) {
    float* to = y + m * y_stride;
    const auto run = [&](const auto& tile) {
      run_panels<Isa>(weights, tile, panel_begin, panel_end, to, y_stride);
    };
    const auto pack = [&](GroupedRows* tile) { *tile = pack_groups<Isa>(weights, x, m, scratch); };
    if (x.rows - m <= kSeparateRows) {  // which lie where they are: nothing worth keeping
      run(separate_rows(weights, x, m, scratch));
    } else {
      run(packed_tile<GroupedRows>(weights, x, scratch, pack));
    }
  }
}

}  // namespace
}  // namespace edgelora::kernels
