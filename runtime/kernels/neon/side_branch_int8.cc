// y[m, 16p + i] += t_scale[m] · scale[p, i] · Σ_r b[p, r, i]·t[m, r], b and t int8
//
//   pairs [8]   int32, two lanes for each row of b: smull and, of the next four columns, smlal, two
//               products ≤ 127·127·2 = 32258 in int16, then added in pairs
#include "kernels/neon/neon.h"
#include "kernels/neon/side_branch_int8.h"

namespace edgelora::kernels::neon {
namespace {

// Of four columns, or of eight.
template <bool kEight>
EDGELORA_INLINE void add_quads(const uint8_t* b, const int8_t* t, int32x4_t pairs[8]) {
  const int8x16_t first = broadcast_quad(t), second = broadcast_quad(t + (kEight ? 4 : 0));
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const int8x16_t column = load_column(b + 16 * j);
    int16x8_t low = vmull_s8(vget_low_s8(column), vget_low_s8(first));
    int16x8_t high = vmull_high_s8(column, first);
    if (kEight) {
      const int8x16_t next = load_column(b + 64 + 16 * j);
      low = vmlal_s8(low, vget_low_s8(next), vget_low_s8(second));
      high = vmlal_high_s8(high, next, second);
    }
    pairs[2 * j] = vpadalq_s16(pairs[2 * j], low);
    pairs[2 * j + 1] = vpadalq_s16(pairs[2 * j + 1], high);
  }
}

struct SideBranch {
  static constexpr int kMostRows = 1;
  static constexpr int kPanels = 1;

  template <int, int>
  static void add_rows(const PackedPanels& panel, const PackedT& t, float* y, int64_t) {
    const uint8_t* b = panel.codes(0);
    const int8_t* codes = packed_codes(t, 0);
    int32x4_t pairs[8], sums[4];
    for (auto& pair : pairs) pair = vdupq_n_s32(0);
    int64_t q = 0;
    for (; q + 2 <= panel.quads; q += 2) add_quads<true>(b + 64 * q, codes + 4 * q, pairs);
    if (q < panel.quads) add_quads<false>(b + 64 * q, codes + 4 * q, pairs);
    for (int j = 0; j < 4; ++j) sums[j] = vpaddq_s32(pairs[2 * j], pairs[2 * j + 1]);
    add_scaled(sums, panel.first, packed_scale(t, 0), panel.columns, y);
  }
};

}  // namespace

void side_branch_up_int8(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                         int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride) {
  drive_packed_factors<SideBranch>(factors, out_features, t, panel_begin, panel_end, y, y_stride);
}

}  // namespace edgelora::kernels::neon
