// The dots of one block by sdot, for neon_dotprod and, where there is one row of x, neon_i8mm; each
// folder compiles its own copy with its own flags.
#pragma once

#include "kernels/neon/scales.h"

namespace edgelora::kernels {
namespace {

struct Sdot {
  // kSource: how `block` lies, as kFormat's codes or as bytes; i is [block, first row] in the tile.
  template <Format kFormat, Format kSource, int kRows>
  static EDGELORA_INLINE void dots(const uint8_t* block, const Scales& s, const RowTile& x,
                                   int64_t i, int32x4_t sums[kRows][4]) {
#pragma GCC unroll 16
    for (int j = 0; j < kRows * 4; ++j) {
      sums[j / 4][j % 4] = first_sum<kSource>(s, j % 4, x, i + j / 4);
    }
    add_half<kSource, kRows, 0>(block, x.codes + i * kActivationBlock, sums);
    add_half<kSource, kRows, 1>(block, x.codes + i * kActivationBlock, sums);
  }

 private:
  // 16 K, kHalf of the block's two, of 16 rows of W times kRows rows of x.
  template <Format kSource, int kRows, int kHalf>
  static EDGELORA_INLINE void add_half(const uint8_t* block, const int8_t* x,
                                       int32x4_t sums[kRows][4]) {
    int8x16_t sixteen[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sixteen[r] = vld1q_s8(x + r * kActivationBlock + kHalf * 16);
    }
    // So many registers of W at a time that no sum waits for the one before.
    constexpr int kStep = kRows == 1 ? 4 : 2;
#pragma GCC unroll 2
    for (int g = 0; g < 4; g += kStep) {
      add_codes<kSource, kRows, kStep, 0>(block, 2 * kHalf, g, sixteen, sums);
    }
#pragma GCC unroll 2
    for (int g = 0; g < 4; g += kStep) {
      add_codes<kSource, kRows, kStep, 2>(block, 2 * kHalf + 1, g, sixteen, sums);
    }
  }

  // 8 K, q of the block's four and from kLane of the sixteen, of kStep registers of W from g.
  template <Format kSource, int kRows, int kStep, int kLane>
  static EDGELORA_INLINE void add_codes(const uint8_t* block, int q, int g,
                                        const int8x16_t sixteen[kRows],
                                        int32x4_t sums[kRows][4]) {
    Codes w[kStep];
#pragma GCC unroll 4
    for (int i = 0; i < kStep; ++i) w[i] = load_codes<kSource>(block, q, g + i);
#pragma GCC unroll 16
    for (int j = 0; j < kRows * kStep; ++j) {
      int32x4_t& sum = sums[j / kStep][g + j % kStep];
      sum = vdotq_laneq_s32(sum, w[j % kStep].low, sixteen[j / kStep], kLane);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kRows * kStep; ++j) {
      int32x4_t& sum = sums[j / kStep][g + j % kStep];
      sum = vdotq_laneq_s32(sum, w[j % kStep].high, sixteen[j / kStep], kLane + 1);
    }
  }
};

}  // namespace
}  // namespace edgelora::kernels
