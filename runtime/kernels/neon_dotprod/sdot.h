// One row of x: the dots of one block by sdot, for neon_dotprod and neon_i8mm; each folder compiles
// its own copy with its own flags.
//
// Four rows of W × 8 K of nibbles are one register (neon/codes.h draws it): a 32-bit lane is a row.
// sdot adds four signed byte products to each lane; its second operand is one lane of a register
// of 16 K of x, so x needs no broadcast:
//     dot[r] += Σ_j w[r, j]·x[j]
//
// int4: codes 0 … 15 as they are, the sum starts at −8·Σx (zero points: −zp·Σx).
// int8: bytes as they are; nf4, fp4: a byte table, tbl, and where nf4 starts (neon/four_rows.h).
#pragma once

#include "kernels/neon/scales.h"

namespace edgelora::kernels {
namespace {

struct Sdot {
  // kSource: how `block` lies; i is [block, row] in the tile. One row alone, as one_row asks.
  template <Format kFormat, Format kSource, int kRows>
  static EDGELORA_INLINE void dots(const uint8_t* block, const Scales& s, const RowTile& x,
                                   int64_t i, float32x4_t out[kRows][4]) {
    static_assert(kRows == 1);
    int32x4_t sums[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) sums[g] = first_sum<kFormat, kSource>(s, g, x, i, kFloatBits);
    add_half<kSource, 0>(block, x.codes + i * kActivationBlock, sums);
    add_half<kSource, 1>(block, x.codes + i * kActivationBlock, sums);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) out[0][g] = float_of_biased(sums[g]);
  }

 private:
  // 16 K, kHalf of the block's two, of 16 rows of W.
  template <Format kSource, int kHalf>
  static EDGELORA_INLINE void add_half(const uint8_t* block, const int8_t* x, int32x4_t sums[4]) {
    const int8x16_t sixteen = vld1q_s8(x + kHalf * 16);
    add_codes<kSource, 0>(block, 2 * kHalf, sixteen, sums);
    add_codes<kSource, 2>(block, 2 * kHalf + 1, sixteen, sums);
  }

  // 8 K, q of the block's four and from kLane of the sixteen; no sum waits for the one before.
  template <Format kSource, int kLane>
  static EDGELORA_INLINE void add_codes(const uint8_t* block, int q, int8x16_t sixteen,
                                        int32x4_t sums[4]) {
    Codes w[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) w[g] = load_codes<kSource>(block, q, g);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      sums[g] = vdotq_laneq_s32(sums[g], w[g].low, sixteen, kLane);
    }
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      sums[g] = vdotq_laneq_s32(sums[g], w[g].high, sixteen, kLane + 1);
    }
  }
};

}  // namespace
}  // namespace edgelora::kernels
