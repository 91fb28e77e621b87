// y[m, 16p + i] += t_scale[m] · scale[p, i] · Σ_r b[p, r, i]·t[m, r], b int8, t int16
//
// b of a panel: 16 scales, then two columns r a time, 32 bytes, which ld2 takes apart:
//     │ row 0: r, r+1 │ row 1: r, r+1 │ … │ row 15 │
//   sums [4]   int32, rows 4j … 4j+3: widened b times t[r], a multiply-add with a scalar
#include <arm_neon.h>

#include "kernels/neon/neon.h"
#include "kernels/packed_factors.h"

namespace edgelora::kernels::neon {
namespace {

struct Sums {
  int32x4_t of[4];
};

void add_column(int8x16_t column, int16_t t, Sums* sums) {
  const int16x8_t low = vmovl_s8(vget_low_s8(column)), high = vmovl_s8(vget_high_s8(column));
  sums->of[0] = vmlal_n_s16(sums->of[0], vget_low_s16(low), t);
  sums->of[1] = vmlal_n_s16(sums->of[1], vget_high_s16(low), t);
  sums->of[2] = vmlal_n_s16(sums->of[2], vget_low_s16(high), t);
  sums->of[3] = vmlal_n_s16(sums->of[3], vget_high_s16(high), t);
}

Sums panel_sums(const uint8_t* b, const int16_t* t, int64_t pairs) {
  Sums sums{};
  for (int64_t q = 0; q < pairs; ++q) {
    const int8x16x2_t columns = vld2q_s8(reinterpret_cast<const int8_t*>(b) + 32 * q);
    add_column(columns.val[0], t[2 * q], &sums);
    add_column(columns.val[1], t[2 * q + 1], &sums);
  }
  return sums;
}

// y [rows ≤ 16] += factor · scales · sums
void add_scaled(const Sums& sums, const uint8_t* scales, float factor, int64_t rows, float* y) {
  float added[kPanelRows];
  for (int j = 0; j < 4; ++j) vst1q_f32(added + 4 * j, vcvtq_f32_s32(sums.of[j]));
  for (int64_t i = 0; i < rows; ++i) y[i] += added[i] * half_to_float(load_u16(scales, i)) * factor;
}

struct SideBranch {
  static constexpr int kMostRows = 1;

  template <int kRows>
  static void add_rows(const uint8_t* panel, int64_t pairs, const PackedT& t, int64_t m,
                       int64_t columns, float* y, int64_t y_stride) {
    static_assert(kRows == 1);
    const Sums sums = panel_sums(panel + 32, packed_codes(t, m), pairs);
    add_scaled(sums, panel, packed_scale(t, m), columns, y + m * y_stride);
  }
};

}  // namespace

void side_branch_up_int8(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                         int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride) {
  drive_packed_factors<SideBranch>(factors, out_features, t, panel_begin, panel_end, y, y_stride);
}

}  // namespace edgelora::kernels::neon
