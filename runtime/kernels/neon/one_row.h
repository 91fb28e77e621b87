// A panel times one row of x, for Isas whose registers hold four rows of W. Isa::dots gives the
// dots of one block, exact integers; acc is in four registers through all blocks. kRounded: as the
// Isa's groups of rows round.
#pragma once

#include "kernels/neon/scales.h"

namespace edgelora::kernels {
namespace {

template <class Isa, Format kFormat, Rounded kRounded = Rounded::kScales>
void one_row(const PanelView& panel, const RowTile& x, float* acc) {
  float32x4_t sums[4];
  for (float32x4_t& sum : sums) sum = vdupq_n_f32(0.0f);
  for (int64_t b = 0; b < panel.blocks; ++b) {
    const Scales scales = load_scales<kFormat>(panel, b);
    float32x4_t dots[1][4];
    Isa::template dots<kFormat, kFormat, 1>(block_codes<kFormat>(panel.codes, b), scales, x, b,
                                            dots);
    add_block<kFormat, kRounded>(dots[0], scales, x_scale<kFormat>(x, b), sums);
  }
  for (int g = 0; g < 4; ++g) vst1q_f32(acc + 4 * g, sums[g]);
}

}  // namespace
}  // namespace edgelora::kernels
