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

constexpr int kMostRows = 8;
constexpr int kChains = 4;

inline __m512i unsigned_column(const uint8_t* b) { return Registers::flip(Registers::load(b)); }

inline __m512i start(const PackedT& t, int64_t row) {
  return _mm512_sub_epi32(_mm512_setzero_si512(),
                          _mm512_slli_epi32(_mm512_set1_epi32(packed_sum(t, row)), 7));
}

// Neighbouring panels and where their rows of y lie; of the last one those in `lanes`.
struct Panels {
  const uint8_t* first;
  int64_t quads;
  __mmask16 lanes;
  float* y;
  int64_t y_stride;

  const uint8_t* at(int p) const { return first + p * packed_panel_bytes(quads); }
  const uint8_t* codes(int p) const { return at(p) + kPackedScaleBytes; }
};

inline void add_row(const Panels& panels, int p, __mmask16 lanes, int64_t row, __m512i sum,
                    __m512 scale, __m512 factor) {
  float* to = panels.y + row * panels.y_stride + p * kPanelRows;
  const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
  const __m512 before = _mm512_maskz_loadu_ps(lanes, to);
  _mm512_mask_storeu_ps(to, lanes, _mm512_fmadd_ps(product, factor, before));
}

inline __m512 load_scales(const uint8_t* panel) {
  return Registers::load_halves(reinterpret_cast<const uint16_t*>(panel));
}

template <int kRows, int kPanels>
void sum_panels(const Panels& panels, const PackedT& t, int64_t m, __m512i sums[kRows][kPanels]) {
  const int8_t* codes = packed_codes(t, m);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) sums[r][p] = start(t, m + r);
  }
  for (int64_t q = 0; q < panels.quads; ++q, codes += 4) {
    __m512i columns[kPanels];
    for (int p = 0; p < kPanels; ++p) columns[p] = unsigned_column(panels.codes(p) + 64 * q);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i quad = Registers::broadcast4(codes + 4 * r * t.stride);
      for (int p = 0; p < kPanels; ++p) {
        sums[r][p] = Registers::dot(sums[r][p], columns[p], quad);
      }
    }
  }
}

// Rows m … m + kRows − 1 of t.
template <int kRows, int kPanels>
void add_rows(const Panels& panels, const PackedT& t, int64_t m) {
  __m512i sums[kRows][kPanels];
  sum_panels<kRows, kPanels>(panels, t, m, sums);
  __m512 scales[kPanels];
  for (int p = 0; p < kPanels; ++p) scales[p] = load_scales(panels.at(p));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m512 factor = _mm512_set1_ps(packed_scale(t, m + r));
    for (int p = 0; p < kPanels; ++p) {
      const __mmask16 lanes = p + 1 < kPanels ? __mmask16{0xffff} : panels.lanes;
      add_row(panels, p, lanes, m + r, sums[r][p], scales[p], factor);
    }
  }
}

void add_one_row(const Panels& panel, const PackedT& t) {
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
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(chains[0], chains[1]),
                                       _mm512_add_epi32(chains[2], chains[3]));
  add_row(panel, 0, panel.lanes, 0, sum, load_scales(panel.at(0)),
          _mm512_set1_ps(packed_scale(t, 0)));
}

template <int kPanels>
void add_panels(const Panels& panels, const PackedT& t) {
  int64_t m = 0;
  for (; m + kMostRows <= t.rows; m += kMostRows) add_rows<kMostRows, kPanels>(panels, t, m);
  for (; m + 2 <= t.rows; m += 2) add_rows<2, kPanels>(panels, t, m);
  if (m < t.rows) add_rows<1, kPanels>(panels, t, m);
}

}  // namespace

void side_branch_up_int8(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                         int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride) {
  const int64_t quads = ceil_div(factors.rank, 4);
  const auto panels = [&](int64_t p, int64_t last) {
    const int64_t columns = min_of(kPanelRows, out_features - last * kPanelRows);
    return Panels{packed_panel(factors, p), quads, static_cast<__mmask16>((1 << columns) - 1),
                  y + p * kPanelRows, y_stride};
  };
  int64_t p = panel_begin;
  for (; t.rows > 1 && p + 1 < panel_end; p += 2) add_panels<2>(panels(p, p + 1), t);
  for (; p < panel_end; ++p) {
    const Panels one = panels(p, p);
    fetch_ahead(one.first, quads);
    t.rows == 1 ? add_one_row(one, t) : add_panels<1>(one, t);
  }
}

}  // namespace edgelora::kernels::avx512_vnni
