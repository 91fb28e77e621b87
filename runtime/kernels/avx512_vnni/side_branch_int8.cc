// y[m, 16p + i] += t_scale[m] · scale[p, i] · Σ_r b[p, r, i]·t[m, r], b and t int8
//
// b of a panel: 16 scales, then four columns r at a time, 64 bytes, a register whose 32-bit lanes
// are the panel's rows:
//     │ row 0: r … r+3 │ row 1: r … r+3 │ … │ row 15 │
// vpdpbusd multiplies unsigned by signed: b xor 0x80 = b + 128, and a row's sum starts at −128·Σt.
//   sums [rows][panels]   int32, 16 rows of b; what is broadcast of t serves two panels, what is
//                         loaded of b up to kMostRows rows of t. One row alone has kChains sums of
//                         one panel, to hide the latency
#include <immintrin.h>

#include "kernels/avx512_vnni/avx512_vnni.h"
#include "kernels/avx512_vnni/registers.h"
#include "kernels/packed_factors.h"

namespace edgelora::kernels::avx512_vnni {
namespace {

constexpr int kChains = 4;

inline __m512i unsigned_column(const uint8_t* b) { return Registers::flip(Registers::load(b)); }

inline __m512i start(const PackedT& t, int64_t row) {
  return _mm512_set1_epi32(packed_start(t, row));
}

inline __m512 load_scales(const uint8_t* panel) {
  return Registers::load_halves(reinterpret_cast<const uint16_t*>(panel));
}

struct SideBranch {
  static constexpr int kMostRows = 8;
  static constexpr int kPanels = 2;

  template <int kRows, int kTogether>
  static void add_rows(const PackedPanels& b, const PackedT& t, float* y, int64_t y_stride) {
    __m512i sums[kRows][kTogether];
    if constexpr (kRows == 1 && kTogether == 1) {
      sums[0][0] = sum_row(b, t);
    } else {
      sum_rows<kRows, kTogether>(b, t, sums);
    }
    __m512 scales[kTogether];
    for (int p = 0; p < kTogether; ++p) scales[p] = load_scales(b.at(p));
    const float* t_scales = t.data;
    const int64_t t_stride = t.stride;  // not read again after each store
    const auto lanes = static_cast<__mmask16>((1 << b.columns) - 1);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 factor = _mm512_set1_ps(*t_scales);
      for (int p = 0; p < kTogether; ++p) {
        const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][p]), scales[p]);
        add(product, factor, kTogether > 1 ? __mmask16{0xffff} : lanes, y + p * kPanelRows);
      }
      t_scales += t_stride;
      y += y_stride;
    }
  }

 private:
  static void add(__m512 product, __m512 factor, __mmask16 lanes, float* y) {
    const __m512 before = _mm512_maskz_loadu_ps(lanes, y);
    _mm512_mask_storeu_ps(y, lanes, _mm512_fmadd_ps(product, factor, before));
  }

  template <int kRows, int kTogether>
  EDGELORA_INLINE static void sum_rows(const PackedPanels& b, const PackedT& t,
                                       __m512i (&sums)[kRows][kTogether]) {
    const int8_t* codes = packed_codes(t, 0);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kTogether; ++p) sums[r][p] = start(t, r);
    }
    for (int64_t q = 0; q < b.quads; ++q, codes += 4) {
      __m512i columns[kTogether];
      for (int p = 0; p < kTogether; ++p) columns[p] = unsigned_column(b.codes(p) + 64 * q);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i quad = Registers::broadcast4(codes + 4 * r * t.stride);
        for (int p = 0; p < kTogether; ++p) {
          sums[r][p] = Registers::dot(sums[r][p], columns[p], quad);
          Registers::keep(&sums[r][p]);
        }
      }
    }
  }

  static __m512i sum_row(const PackedPanels& panel, const PackedT& t) {
    const int8_t* codes = packed_codes(t, 0);
    const uint8_t* b = panel.codes(0);
    __m512i chains[kChains] = {start(t, 0)};
    for (int i = 1; i < kChains; ++i) chains[i] = _mm512_setzero_si512();
    const auto add = [&](__m512i sum, int64_t q) {
      return Registers::dot(sum, unsigned_column(b + 64 * q), Registers::broadcast4(codes + 4 * q));
    };
    int64_t q = 0;
    for (; q + kChains <= panel.quads; q += kChains) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) chains[i] = add(chains[i], q + i);
    }
    for (; q < panel.quads; ++q) chains[0] = add(chains[0], q);
    return _mm512_add_epi32(_mm512_add_epi32(chains[0], chains[1]),
                            _mm512_add_epi32(chains[2], chains[3]));
  }
};

}  // namespace

void side_branch_up_int8(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                         int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride) {
  drive_packed_factors<SideBranch>(factors, out_features, t, panel_begin, panel_end, y, y_stride);
}

}  // namespace edgelora::kernels::avx512_vnni
