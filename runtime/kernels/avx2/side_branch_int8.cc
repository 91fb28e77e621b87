// y[m, 16p + i] += t_scale[m] · scale[p, i] · Σ_r b[p, r, i]·t[m, r], b and t int8
//
// b of a panel: 16 scales, then four columns r at a time, 64 bytes, two registers:
//     │ row 0: r … r+3 │ row 1: r … r+3 │ … │ row 15 │
// maddubs(|b|, t with b's sign) ≤ 127·127·2 = 32258 fits int16, but no two of them do; a 32-bit
// lane is a row of b.
//   low, high   int32, rows 0–7 and 8–15
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/registers.h"
#include "kernels/packed_factors.h"

namespace edgelora::kernels::avx2 {
namespace {

struct Halves {
  __m256i low;
  __m256i high;
};

// sum + Σ b·t of each 32-bit lane; magnitude = |b|
inline __m256i add_quad(__m256i sum, __m256i magnitude, __m256i b, __m256i t) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(t, b));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

struct Scales {
  explicit Scales(const uint8_t* panel) : low(load_half8(panel)), high(load_half8(panel + 16)) {}
  __m256 low;
  __m256 high;
};

// y [columns ≤ 16] += factor · scales · sums
inline void add_scaled(const Halves& sums, const Scales& scales, float factor, int64_t columns,
                       float* y) {
  const __m256 f = _mm256_set1_ps(factor);
  const __m256 low = _mm256_mul_ps(_mm256_cvtepi32_ps(sums.low), scales.low);
  const __m256 high = _mm256_mul_ps(_mm256_cvtepi32_ps(sums.high), scales.high);
  if (columns == kPanelRows) {
    _mm256_storeu_ps(y, fma(low, f, _mm256_loadu_ps(y)));
    _mm256_storeu_ps(y + 8, fma(high, f, _mm256_loadu_ps(y + 8)));
    return;
  }
  alignas(32) float added[kPanelRows];
  _mm256_store_ps(added, _mm256_mul_ps(low, f));
  _mm256_store_ps(added + 8, _mm256_mul_ps(high, f));
  for (int64_t i = 0; i < columns; ++i) y[i] += added[i];
}

struct SideBranch {
  static constexpr int kMostRows = 4;  // whose sums are in registers
  static constexpr int kPanels = 1;

  template <int kRows, int>
  static void add_rows(const PackedPanels& b, const PackedT& t, float* y, int64_t y_stride) {
    Halves sums[kRows];
    sum_rows<kRows>(b, t, sums);
    const Scales scales(b.first);
    const float* t_scales = t.data;
    const int64_t t_stride = t.stride, columns = b.columns;  // not read again after each store
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r, t_scales += t_stride, y += y_stride) {
      add_scaled(sums[r], scales, *t_scales, columns, y);
    }
  }

 private:
  template <int kRows>
  EDGELORA_INLINE static void sum_rows(const PackedPanels& b, const PackedT& t,
                                       Halves (&sums)[kRows]) {
    const uint8_t* columns = b.codes(0);
    const int8_t* codes = packed_codes(t, 0);
    for (Halves& sum : sums) sum = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t q = 0; q < b.quads; ++q, columns += 64, codes += 4) {
      const __m256i low = load_bytes(columns), high = load_bytes(columns + 32);
      const __m256i low_size = _mm256_abs_epi8(low), high_size = _mm256_abs_epi8(high);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256i quad = broadcast4(codes + 4 * r * t.stride);
        sums[r].low = add_quad(sums[r].low, low_size, low, quad);
        sums[r].high = add_quad(sums[r].high, high_size, high, quad);
      }
    }
  }
};

}  // namespace

void side_branch_up_int8(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                         int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride) {
  drive_packed_factors<SideBranch>(factors, out_features, t, panel_begin, panel_end, y, y_stride);
}

}  // namespace edgelora::kernels::avx2
