// y[m, n] = Σ_b xscale[m, b] · (scale[n, b] · dot_b [+ offset[n, b] · sum_b]),  b: blocks of 32 of
// K
//
// Four rows of W × 8 K of nibbles are one register (codes.h draws it): a 32-bit lane is a row.
// x is broadcast 4 bytes at a time; smull and smlal multiply eight bytes into eight int16:
//     low  │ r0: K0 K1 K2 K3 │ r1: K0 … │        high  │ r2 │ r3 │
//
// int4: a block adds eight products of at most 15·127 to a lane, two lanes together 30480: int16
//   holds them, and one addp and one sadalp a block leave the dots of four rows.
// int8: two products of at most 128·127 are 32512, so every second one is followed by sadalp.
// nf4, fp4: a byte table, tbl, gives w = round(124.125·value) (fp4: 120·value); then as int8. The
//   rounding costs at most 0.0024 (0.0031) of absmax a weight. nf4's sums start at −5/32·Σx.
//
// Tile: 16 rows of W × 1 row of x (decode) or 2 (several rows, whose codes are unpacked once for up
// to kRowTile).
//   sums [rows][4]   two registers each: int16 (int4) or int32 (int8, nf4, fp4), 16 of the 32
//                    registers
//   acc              float; registers for one row of x, [rows, 16] in L1 for several
#include <type_traits>

#include "kernels/neon/neon.h"
#include "kernels/neon/panel_rows.h"
#include "kernels/absmax_scales.h"

namespace edgelora::kernels::neon {
namespace {

constexpr bool signed_codes(Format format) {
  return format == Format::kInt8 || has_codebook(format);
}

// 4 K of x in every 32-bit lane; kLane: which 4 of 16.
template <int kLane>
EDGELORA_INLINE int8x16_t broadcast4(int8x16_t x) {
  return vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), kLane));
}

// Products of four rows' bytes with x, not yet summed over a row's lanes.
struct Products {
  int16x8_t low, high;

  template <bool kFirst>
  EDGELORA_INLINE void add(int8x16_t w, int8x16_t x) {
    low = kFirst ? vmull_s8(vget_low_s8(w), vget_low_s8(x))
                 : vmlal_s8(low, vget_low_s8(w), vget_low_s8(x));
    high = kFirst ? vmull_high_s8(w, x) : vmlal_high_s8(high, w, x);
  }
};

// A block's dots of four rows; nibbles: products of all its K.
struct NibbleSums {
  Products products;

  EDGELORA_INLINE int32x4_t rows(int32x4_t first) const {
    return vpadalq_s16(first, vpaddq_s16(products.low, products.high));
  }
};

struct ByteSums {
  int32x4_t low, high;

  template <bool kFirst>
  EDGELORA_INLINE void add(const Products& pairs) {
    low = kFirst ? vpaddlq_s16(pairs.low) : vpadalq_s16(low, pairs.low);
    high = kFirst ? vpaddlq_s16(pairs.high) : vpadalq_s16(high, pairs.high);
  }
  EDGELORA_INLINE int32x4_t rows(int32x4_t first) const {
    return vaddq_s32(first, vpaddq_s32(low, high));
  }
};

template <Format kFormat>
using Sums = std::conditional_t<signed_codes(kFormat), ByteSums, NibbleSums>;

// 8 K of kStep registers of W, from g on, times kRows rows of x. All first products, then all
// second ones: on a core that does not reorder, none waits for the one before.
template <Format kFormat, int kRows, int kStep, bool kFirst>
EDGELORA_INLINE void add_products(const Codes w[kStep], int g, const int8x16_t x0[kRows],
                                  const int8x16_t x1[kRows], Sums<kFormat> sums[kRows][4]) {
  Products pairs[kRows * kStep];
#pragma GCC unroll 4
  for (int j = 0; j < kRows * kStep; ++j) {
    if constexpr (signed_codes(kFormat)) {
      pairs[j].template add<true>(w[j % kStep].low, x0[j / kStep]);
    } else {
      sums[j / kStep][g + j % kStep].products.template add<kFirst>(w[j % kStep].low, x0[j / kStep]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kRows * kStep; ++j) {
    if constexpr (signed_codes(kFormat)) {
      pairs[j].template add<false>(w[j % kStep].high, x1[j / kStep]);
    } else {
      sums[j / kStep][g + j % kStep].products.template add<false>(w[j % kStep].high, x1[j / kStep]);
    }
  }
  if constexpr (signed_codes(kFormat)) {
#pragma GCC unroll 4
    for (int j = 0; j < kRows * kStep; ++j) {
      sums[j / kStep][g + j % kStep].template add<kFirst>(pairs[j]);
    }
  }
}

// 8 K of 16 rows of W times kRows rows of x. kSource: how `block` lies, kFormat's codes or bytes.
template <Format kFormat, Format kSource, int kRows, int kQ>
EDGELORA_INLINE void add_line(const uint8_t* block, const int8_t* x,
                              Sums<kFormat> sums[kRows][4]) {
  int8x16_t x0[kRows], x1[kRows];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    const int8x16_t sixteen = vld1q_s8(x + r * kActivationBlock + kQ / 2 * 16);
    x0[r] = broadcast4<kQ % 2 * 2>(sixteen);
    x1[r] = broadcast4<kQ % 2 * 2 + 1>(sixteen);
  }
  constexpr int kStep = kRows == 1 ? 4 : signed_codes(kFormat) ? 1 : 2;  // what the registers hold
#pragma GCC unroll 4
  for (int g = 0; g < 4; g += kStep) {
    Codes w[kStep];
#pragma GCC unroll 4
    for (int i = 0; i < kStep; ++i) w[i] = load_codes<kSource>(block, kQ, g + i);
    add_products<kFormat, kRows, kStep, kQ == 0>(w, g, x0, x1, sums);
  }
}

struct Isa {
  using Rows = RowTile;  // several rows of x

  static constexpr int kTileRows = 2;

  static int32_t term_zero(Format format) { return neon_term_zero(format); }

  template <Format kFormat, Format kSource, int kRows>
  static EDGELORA_INLINE void dots(const uint8_t* block, const Scales& s, const RowTile& x,
                                   int64_t i, float32x4_t out[kRows][4]) {
    const int8_t* codes = x.codes + i * kActivationBlock;
    Sums<kFormat> sums[kRows][4];
    add_line<kFormat, kSource, kRows, 0>(block, codes, sums);
    add_line<kFormat, kSource, kRows, 1>(block, codes, sums);
    add_line<kFormat, kSource, kRows, 2>(block, codes, sums);
    add_line<kFormat, kSource, kRows, 3>(block, codes, sums);
#pragma GCC unroll 8
    for (int j = 0; j < kRows * 4; ++j) {
      const int32x4_t first = first_sum<kFormat, kSource>(s, j % 4, x, i + j / 4, 0);
      out[j / 4][j % 4] = vcvtq_f32_s32(sums[j / 4][j % 4].rows(first));
    }
  }

  template <Format kFormat>
  static void panel(const PanelView& view, const RowTile& x, float* acc) {
    panel_of_rows<Isa, kFormat>(view, x, acc);
  }
};

}  // namespace

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch) {
  drive_linear<Isa>(weights, x, panel_begin, panel_end, y, y_stride, scratch);
}

void unpack_absmax(const Weights& weights, int64_t panel, uint16_t* scales, void* scratch) {
  unpack_absmax_panel(weights, panel, codebook(weights.format).byte_scale, store_half16, scales,
                      scratch);
}

}  // namespace edgelora::kernels::neon
