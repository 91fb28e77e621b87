// y[m, n] = Σ_b xscale[m, b] · (scale[n, b] · dot_b [+ offset[n, b] · sum_b]),  b: blocks of 32 of
// K
//
// One row of x: sdot (neon_dotprod/sdot.h). Several: smmla multiplies 2 rows of x × 8 K with 8 K ×
// 2 rows of W into four int32:
//     x  │ m: K0 … K7 │ m+1: K0 … K7 │        w  │ r: K0 … K7 │ r+1: K0 … K7 │
//     sum  │ m·r │ m·(r+1) │ (m+1)·r │ (m+1)·(r+1) │
// A register of W's nibbles (neon/codes.h) has K0 … K3 of four rows low and K4 … K7 high: zip1 and
// zip2 of the two make the registers of rows r, r+1 and r+2, r+3. Two registers of x are made of
// two rows' 16 K in the same way.
//
// int4: codes 0 … 15 as they are, the sum starts at −8·Σx (zero points: −zp·Σx); where a block is
//   unpacked for many rows, codes less 8 (zero points: zp), and the sum starts at 0.
// int8: bytes as they are.
// nf4: a byte table, tbl, gives w = round(124.125·value). The rounding costs at most 0.0037 of
//   absmax a weight.
//
// Tile: 16 rows of W × 4 rows of x; more than 4 rows have a block's codes unpacked once for up to
// 32. An odd last row is its own partner.
//   sums [pairs of x][8]   int32, up to 16 of the 32 registers
//   acc                    float [rows, 16] in L1, until the end in the order of the sums:
//                          [pairs of x][8][4]
#include "kernels/neon/panel_rows.h"
#include "kernels/neon_dotprod/sdot.h"
#include "kernels/neon_i8mm/neon_i8mm.h"

namespace edgelora::kernels::neon_i8mm {
namespace {

EDGELORA_INLINE int8x16_t zip_low(int8x16_t a, int8x16_t b) {
  return vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}

EDGELORA_INLINE int8x16_t zip_high(int8x16_t a, int8x16_t b) {
  return vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}

struct PairCodes {        // 8 K of four rows of W
  int8x16_t first, last;  // rows r, r+1; rows r+2, r+3
};

EDGELORA_INLINE PairCodes paired(const Codes& w) {
  return {zip_low(w.low, w.high), zip_high(w.low, w.high)};
}

// One block unpacked: [q][g] of PairCodes.
struct alignas(64) PairBytes {
  int8_t of[kInt8BlockBytes];
};

template <Format kFormat>
void unpack_pairs(const uint8_t* block, const Scales& scales, PairBytes* out) {
  for (int g = 0; g < 4; ++g) {
    for (int q = 0; q < 4; ++q) {
      const PairCodes w = paired(load_bytes_of<kFormat>(block, scales, q, g));
      vst1q_s8(out->of + 128 * q + 32 * g, w.first);
      vst1q_s8(out->of + 128 * q + 32 * g + 16, w.last);
    }
  }
}

// Where a block's pairs come from: its codes in the panel, or PairBytes.
template <Format kFormat>
struct FromCodes {
  static constexpr Format kSource = kFormat;
  static EDGELORA_INLINE PairCodes load(const uint8_t* block, int q, int g) {
    return paired(load_codes<kFormat>(block, q, g));
  }
};

struct FromPairs {
  static constexpr Format kSource = Format::kInt8;
  static EDGELORA_INLINE PairCodes load(const uint8_t* block, int q, int g) {
    const auto* from = reinterpret_cast<const int8_t*>(block) + 128 * q + 32 * g;
    return {vld1q_s8(from), vld1q_s8(from + 16)};
  }
};

// Each of four rows' scales twice: for the two rows of x that meet rows r, r+1 and r+2, r+3.
struct PairScales {
  float32x4_t scale[8];
  float32x4_t offset[8];
  int32x4_t zero_points[8];
};

void pair_floats(const float32x4_t* rows, float32x4_t* out) {
  for (int g = 0; g < 4; ++g) {
    out[2 * g] = vcombine_f32(vget_low_f32(rows[g]), vget_low_f32(rows[g]));
    out[2 * g + 1] = vcombine_f32(vget_high_f32(rows[g]), vget_high_f32(rows[g]));
  }
}

void pair_integers(const int32x4_t* rows, int32x4_t* out) {
  for (int g = 0; g < 4; ++g) {
    out[2 * g] = vcombine_s32(vget_low_s32(rows[g]), vget_low_s32(rows[g]));
    out[2 * g + 1] = vcombine_s32(vget_high_s32(rows[g]), vget_high_s32(rows[g]));
  }
}

template <Format kFormat>
PairScales pair_scales(const Scales& rows) {
  PairScales s;
  pair_floats(rows.scale, s.scale);
  if constexpr (kFormat == Format::kInt4Offsets) pair_floats(rows.offset, s.offset);
  if constexpr (kFormat == Format::kInt4ZeroPoints) {
    pair_integers(rows.zero_points, s.zero_points);
  }
  return s;
}

// │ m │ m │ m+1 │ m+1 │ of an array [block, row]; `step` is 0 for a row without partner.
EDGELORA_INLINE float32x4_t two_each(const float* from, int64_t step) {
  return vcombine_f32(vdup_n_f32(from[0]), vdup_n_f32(from[step]));
}

EDGELORA_INLINE int32x4_t two_each(const int32_t* from, int64_t step) {
  return vcombine_s32(vdup_n_s32(from[0]), vdup_n_s32(from[step]));
}

template <Format kSource>
EDGELORA_INLINE void first_sums(const PairScales& s, const RowTile& x, int64_t i, int64_t step,
                                int32x4_t sums[8]) {
#pragma GCC unroll 8
  for (int w = 0; w < 8; ++w) {
    sums[w] = vdupq_n_s32(kFloatBits);
    if constexpr (kSource == Format::kInt4) {
      sums[w] = vaddq_s32(sums[w], two_each(x.terms + i, step));
    } else if constexpr (kSource == Format::kInt4ZeroPoints) {
      sums[w] = vmlaq_s32(sums[w], s.zero_points[w], two_each(x.terms + i, step));
    }
  }
}

// Two rows of x, 16 K: as smmla wants them.
struct XPair {
  int8x16_t of[2];  // K 0 … 7, K 8 … 15
};

EDGELORA_INLINE XPair load_x(const int8_t* first, const int8_t* second) {
  const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(first));
  const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(second));
  return {{vreinterpretq_s8_s64(vzip1q_s64(a, b)), vreinterpretq_s8_s64(vzip2q_s64(a, b))}};
}

// 16 K, kHalf of the block's two, of kPairs pairs of rows; step: bytes between the rows of a pair.
template <class Source, int kPairs, int kHalf>
EDGELORA_INLINE void add_half(const uint8_t* block, const int8_t* x, int64_t step,
                              int32x4_t sums[kPairs][8]) {
  XPair pairs[kPairs];
#pragma GCC unroll 2
  for (int p = 0; p < kPairs; ++p) {
    const int8_t* from = x + p * 2 * kActivationBlock + kHalf * 16;
    pairs[p] = load_x(from, from + step);
  }
#pragma GCC unroll 2
  for (int q = 0; q < 2; ++q) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const PairCodes w = Source::load(block, kHalf * 2 + q, g);
#pragma GCC unroll 2
      for (int p = 0; p < kPairs; ++p) {
        sums[p][2 * g] = vmmlaq_s32(sums[p][2 * g], pairs[p].of[q], w.first);
        sums[p][2 * g + 1] = vmmlaq_s32(sums[p][2 * g + 1], pairs[p].of[q], w.last);
      }
    }
  }
}

// What two rows of x bring to a block, read before anything is stored.
struct XPairScale {
  float32x4_t scale;
  float32x4_t shift;  // kInt4Offsets
};

template <Format kFormat>
EDGELORA_INLINE XPairScale x_pair_scale(const RowTile& x, int64_t i, int64_t step) {
  const bool offsets = kFormat == Format::kInt4Offsets;
  return {two_each(x.scales + i, step),
          offsets ? two_each(x.shifts + i, step) : vdupq_n_f32(0.0f)};
}

template <Format kFormat>
EDGELORA_INLINE void add_to_acc(const int32x4_t sums[8], const PairScales& s,
                                const XPairScale& x, float* acc) {
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {  // step by step for four registers, as add_block does
    float32x4_t values[4], scales[4], out[4];
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) values[w] = float_of_biased(sums[half + w]);
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) scales[w] = vmulq_f32(s.scale[half + w], x.scale);
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) out[w] = vld1q_f32(acc + 4 * (half + w));
    if constexpr (kFormat == Format::kInt4Offsets) {
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) out[w] = vfmaq_f32(out[w], s.offset[half + w], x.shift);
    }
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) out[w] = vfmaq_f32(out[w], values[w], scales[w]);
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) vst1q_f32(acc + 4 * (half + w), out[w]);
  }
}

// Rows m … of the tile, kPairs pairs; step is 0 if the only pair has one row.
template <Format kFormat, class Source, int kPairs>
EDGELORA_INLINE void some_pairs(const uint8_t* block, const PairScales& s, const RowTile& x,
                                int64_t b, int64_t m, int64_t step, float* acc) {
  const int64_t i = b * x.rows + m;
  const int8_t* codes = x.codes + i * kActivationBlock;
  int32x4_t sums[kPairs][8];
  XPairScale x_scales[kPairs];
#pragma GCC unroll 2
  for (int p = 0; p < kPairs; ++p) x_scales[p] = x_pair_scale<kFormat>(x, i + 2 * p, step);
#pragma GCC unroll 2
  for (int p = 0; p < kPairs; ++p) first_sums<Source::kSource>(s, x, i + 2 * p, step, sums[p]);
  add_half<Source, kPairs, 0>(block, codes, step * kActivationBlock, sums);
  add_half<Source, kPairs, 1>(block, codes, step * kActivationBlock, sums);
#pragma GCC unroll 2
  for (int p = 0; p < kPairs; ++p) {
    add_to_acc<kFormat>(sums[p], s, x_scales[p], acc + (m + 2 * p) * kPanelRows);
  }
}

template <Format kFormat, class Source>
void all_pairs(const uint8_t* block, const PairScales& s, const RowTile& x, int64_t b,
               float* acc) {
  int64_t m = 0;
  for (; m + 4 <= x.rows; m += 4) some_pairs<kFormat, Source, 2>(block, s, x, b, m, 1, acc);
  for (; m < x.rows; m += 2) {
    some_pairs<kFormat, Source, 1>(block, s, x, b, m, m + 1 < x.rows ? 1 : 0, acc);
  }
}

// acc [pairs][8][4] → [rows, 16]
void unpair(int64_t rows, float* acc) {
  for (int64_t m = 0; m < rows; m += 2) {
    float* pair = acc + m * kPanelRows;
    float32x4_t sums[8];
    for (int w = 0; w < 8; ++w) sums[w] = vld1q_f32(pair + 4 * w);
    for (int g = 0; g < 4; ++g) {
      const float32x4_t a = sums[2 * g], b = sums[2 * g + 1];
      vst1q_f32(pair + 4 * g, vcombine_f32(vget_low_f32(a), vget_low_f32(b)));
      vst1q_f32(pair + kPanelRows + 4 * g, vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
    }
  }
}

template <Format kFormat>
void many_rows(const PanelView& panel, const RowTile& x, float* acc) {
  const int64_t pairs = ceil_div(x.rows, 2);  // acc has room: kRowTile is even
  for (int64_t i = 0; i < pairs * 2 * kPanelRows; ++i) acc[i] = 0.0f;
  PairBytes bytes;
  for (int64_t b = 0; b < panel.blocks; ++b) {
    const Scales scales = load_scales<kFormat>(panel, b);
    const PairScales s = pair_scales<kFormat>(scales);
    const uint8_t* block = block_codes<kFormat>(panel.codes, b);
    if (x.rows <= 4) {
      all_pairs<kFormat, FromCodes<kFormat>>(block, s, x, b, acc);
    } else {
      unpack_pairs<kFormat>(block, scales, &bytes);
      all_pairs<kFormat, FromPairs>(reinterpret_cast<const uint8_t*>(bytes.of), s, x, b, acc);
    }
  }
  unpair(x.rows, acc);
}

struct Isa {
  static int32_t term_factor(Format format) { return neon_term_factor(format); }

  template <Format kFormat>
  static void panel(const PanelView& view, const RowTile& x, float* acc) {
    if (x.rows == 1) {
      one_row<Sdot, kFormat>(view, x, acc);
    } else {
      many_rows<kFormat>(view, x, acc);
    }
  }
};

}  // namespace

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch) {
  drive_linear<Isa>(weights, x, panel_begin, panel_end, y, y_stride, scratch);
}

}  // namespace edgelora::kernels::neon_i8mm
