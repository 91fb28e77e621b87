// y[m, 16p + i] += t_scale[m] · scale[p, i] · Σ_r b[p, r, i]·t[m, r], b and t int8
//
// b of a panel: 16 scales, then four columns r at a time, 64 bytes, a register whose 32-bit lanes
// are the panel's rows:
//     │ row 0: r … r+3 │ row 1: r … r+3 │ … │ row 15 │
// vpdpbusd multiplies unsigned by signed: b xor 0x80 = b + 128, once for up to kMostRows rows of t,
// and a row's sum starts at −128·Σt.
//   sums [rows]   int32, the 16 rows of b; one row alone has kChains of them, to hide the latency
#include <immintrin.h>

#include "kernels/avx512_vnni/avx512_vnni.h"
#include "kernels/packed_factors.h"

namespace edgelora::kernels::avx512_vnni {
namespace {

inline __m512i add_quad(__m512i sum, __m512i column, const int8_t* t) {
  int32_t quad;
  std::memcpy(&quad, t, sizeof quad);
  return _mm512_dpbusd_epi32(sum, column, _mm512_set1_epi32(quad));
}

inline __m512i unsigned_column(const uint8_t* b) {
  return _mm512_xor_si512(_mm512_loadu_si512(b), _mm512_set1_epi8(-128));
}

inline __m512i start(const PackedT& t, int64_t row) {
  return _mm512_set1_epi32(-128 * packed_sum(t, row));
}

template <int kRows>
void sum_panel(const uint8_t* b, const PackedT& t, int64_t m, int64_t quads, __m512i* sums) {
  for (int r = 0; r < kRows; ++r) sums[r] = start(t, m + r);
  for (int64_t q = 0; q < quads; ++q) {
    const __m512i column = unsigned_column(b + 64 * q);
    for (int r = 0; r < kRows; ++r) {
      sums[r] = add_quad(sums[r], column, packed_codes(t, m + r) + 4 * q);
    }
  }
}

constexpr int kChains = 4;

template <>
void sum_panel<1>(const uint8_t* b, const PackedT& t, int64_t m, int64_t quads, __m512i* sums) {
  const int8_t* codes = packed_codes(t, m);
  __m512i chains[kChains] = {start(t, m)};
  for (int i = 1; i < kChains; ++i) chains[i] = _mm512_setzero_si512();
  int64_t q = 0;
  for (; q + kChains <= quads; q += kChains) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      chains[i] = add_quad(chains[i], unsigned_column(b + 64 * (q + i)), codes + 4 * (q + i));
    }
  }
  for (; q < quads; ++q)
    chains[0] = add_quad(chains[0], unsigned_column(b + 64 * q), codes + 4 * q);
  sums[0] = _mm512_add_epi32(_mm512_add_epi32(chains[0], chains[1]),
                             _mm512_add_epi32(chains[2], chains[3]));
}

struct SideBranch {
  static constexpr int kMostRows = 8;

  template <int kRows>
  static void add_rows(const uint8_t* panel, int64_t quads, const PackedT& t, int64_t m,
                       int64_t columns, float* y, int64_t y_stride) {
    const auto lanes = static_cast<__mmask16>((1 << columns) - 1);
    __m512i sums[kRows];
    sum_panel<kRows>(panel + kPackedScaleBytes, t, m, quads, sums);
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
