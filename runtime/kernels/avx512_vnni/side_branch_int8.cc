// y[m, 16p + i] += t_scale[m] · scale[p, i] · Σ_r b[p, r, i]·t[m, r], b int8, t int16
//
// As avx2's, a panel's 16 rows of b in one register: a column pair, 32 bytes, is widened once for up to
// kMostRows rows of t.
//   sums [rows]   int32, the 16 rows of b
#include <immintrin.h>

#include "kernels/avx512_vnni/avx512_vnni.h"
#include "kernels/packed_factors.h"

namespace edgelora::kernels::avx512_vnni {
namespace {

template <int kRows>
void sum_panel(const uint8_t* b, const PackedT& t, int64_t m, int64_t pairs, __m512i* sums) {
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_setzero_si512();
  for (int64_t q = 0; q < pairs; ++q) {
    const __m512i column =
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 32 * q)));
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, packed_codes(t, m + r) + 2 * q, sizeof pair);
      sums[r] = _mm512_dpwssd_epi32(sums[r], column, _mm512_set1_epi32(pair));
    }
  }
}

struct SideBranch {
  static constexpr int kMostRows = 8;

  template <int kRows>
  static void add_rows(const uint8_t* panel, int64_t pairs, const PackedT& t, int64_t m,
                       int64_t columns, float* y, int64_t y_stride) {
    const auto lanes = static_cast<__mmask16>((1 << columns) - 1);
    __m512i sums[kRows];
    sum_panel<kRows>(panel + 32, t, m, pairs, sums);
    const __m512 scales =
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel)));
    for (int r = 0; r < kRows; ++r) {
      float* to = y + (m + r) * y_stride;
      const __m512 factor = _mm512_mul_ps(scales, _mm512_set1_ps(packed_scale(t, m + r)));
      const __m512 before = _mm512_maskz_loadu_ps(lanes, to);
      _mm512_mask_storeu_ps(to, lanes,
                            _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), factor, before));
    }
  }
};

}  // namespace

void side_branch_up_int8(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                         int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride) {
  drive_packed_factors<SideBranch>(factors, out_features, t, panel_begin, panel_end, y, y_stride);
}

}  // namespace edgelora::kernels::avx512_vnni
