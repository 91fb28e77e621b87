// y[m, 16p + i] += t_scale[m] · scale[p, i] · Σ_r b[p, r, i]·t[m, r], b and t int8
//
// sdot adds four products to each 32-bit lane, which is a row of b; a register of b serves up to
// kMostRows rows of t.
#include "kernels/neon/side_branch_int8.h"
#include "kernels/neon_dotprod/neon_dotprod.h"

namespace edgelora::kernels::neon_dotprod {
namespace {

struct SideBranch {
  static constexpr int kMostRows = 4;  // whose sums are in registers
  static constexpr int kPanels = 1;

  template <int kRows, int>
  static void add_rows(const PackedPanels& b, const PackedT& t, float* y, int64_t y_stride) {
    int32x4_t sums[kRows][4];
    for (auto& row : sums) {
      for (auto& sum : row) sum = vdupq_n_s32(0);
    }
    for (int64_t q = 0; q < b.quads; ++q) add_quad(b.codes(0) + 64 * q, q, t, sums);
    for (int r = 0; r < kRows; ++r) {
      add_scaled(sums[r], b.first, packed_scale(t, r), b.columns, y + r * y_stride);
    }
  }

 private:
  template <int kRows>
  static EDGELORA_INLINE void add_quad(const uint8_t* b, int64_t q, const PackedT& t,
                                       int32x4_t (&sums)[kRows][4]) {
    int8x16_t columns[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) columns[j] = load_column(b + 16 * j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const int8x16_t quad = broadcast_quad(packed_codes(t, r) + 4 * q);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[r][j] = vdotq_s32(sums[r][j], columns[j], quad);
    }
  }
};

}  // namespace

void side_branch_up_int8(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                         int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride) {
  drive_packed_factors<SideBranch>(factors, out_features, t, panel_begin, panel_end, y, y_stride);
}

}  // namespace edgelora::kernels::neon_dotprod
