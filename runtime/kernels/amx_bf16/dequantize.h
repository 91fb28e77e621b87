// W and x as bfloat16, for AMX tiles.
#pragma once

#include "kernels/avx512_vnni/registers.h"

namespace edgelora::kernels::amx_bf16 {
namespace {

using avx512_vnni::Registers;

// 32 K of one row of x; to: 64 bytes.
inline void convert_block(const int8_t* codes, float scale, char* to) {
  const __m512 s = _mm512_set1_ps(scale);
  const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128(as_m128(codes)));
  const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128(as_m128(codes + 16)));
  const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_cvtepi32_ps(high), s),
                                            _mm512_mul_ps(_mm512_cvtepi32_ps(low), s));
  std::memcpy(to, &both, sizeof both);
}

// To bfloat16, half away from zero: even K to the low halves of lanes, odd K to the high ones.
inline __m512i join(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
  return _mm512_mask_blend_epi16(0x55555555u, high, low);
}

// One scale block of 16 rows: weight = scale · level [+ addend].
template <Format kFormat>
struct Grid {
  __m512 levels;  // of the 16 codes
  __m512 scale, addend;

  Grid(const PanelView& panel, int64_t b) {
    const Registers::Scales s = Registers::template scales<kFormat>(panel, b, 0);
    scale = s.scale;
    levels = has_codebook(kFormat)
                 ? _mm512_mul_ps(_mm512_loadu_ps(codebook(kFormat).values),
                                 _mm512_set1_ps(codebook(kFormat).byte_scale))
                 : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if constexpr (kFormat == Format::kInt8) scale = _mm512_mul_ps(scale, _mm512_set1_ps(0x1p-24f));
    if constexpr (kFormat == Format::kInt4) addend = _mm512_mul_ps(scale, _mm512_set1_ps(-8));
    if constexpr (kFormat == Format::kInt4Offsets) addend = s.extra;
    if constexpr (kFormat == Format::kInt4ZeroPoints) {
      addend = _mm512_fnmadd_ps(scale, s.extra, _mm512_setzero_ps());
    }
  }

  // A lane of a line has 8 codes of 4 bits: the one from bit kShift on.
  template <int kShift>
  __m512 nibble(__m512i line) const {
    const __m512 level = _mm512_permutexvar_ps(_mm512_srli_epi32(line, kShift), levels);
    if constexpr (has_codebook(kFormat)) return _mm512_mul_ps(level, scale);
    return _mm512_fmadd_ps(level, scale, addend);
  }

  // … or 4 of 8 bits, signed: taken to the lane's top, 2^24 times as much.
  template <int kShift>
  __m512 byte(__m512i line) const {
    const __m512i code = _mm512_and_si512(_mm512_slli_epi32(line, 24 - kShift),
                                          _mm512_set1_epi32(static_cast<int>(0xff000000u)));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(code), scale);
  }
};

// Block b of a panel as a tile: 16 rows of K, 64 bytes each.
template <Format kFormat>
void dequantize_block(const PanelView& panel, int64_t b, char* to) {
  const Grid<kFormat> grid(panel, b);
  const auto store = [to](int row, __m512i pairs) { _mm512_store_si512(to + 64 * row, pairs); };
  if constexpr (kFormat == Format::kInt8) {
    const uint8_t* codes = panel.codes + b * kBlockBytes;
    for (int q = 0; q < 8; ++q) {
      const __m512i line = Registers::load(codes + 64 * q);
      store(2 * q, join(grid.template byte<0>(line), grid.template byte<8>(line)));
      store(2 * q + 1, join(grid.template byte<16>(line), grid.template byte<24>(line)));
    }
    return;
  }
  const uint8_t* codes = panel.codes + b * kBlockBytes / 2;
  for (int q = 0; q < 4; ++q) {
    const __m512i line = Registers::load(codes + 64 * q);
    store(4 * q, join(grid.template nibble<0>(line), grid.template nibble<8>(line)));
    store(4 * q + 1, join(grid.template nibble<16>(line), grid.template nibble<24>(line)));
    store(4 * q + 2, join(grid.template nibble<4>(line), grid.template nibble<12>(line)));
    store(4 * q + 3, join(grid.template nibble<20>(line), grid.template nibble<28>(line)));
  }
}

template <Format kFormat>
void dequantize_panel(const PanelView& panel, int64_t first, int64_t blocks, char* to) {
  constexpr int64_t kAhead = 6144;
  for (int64_t b = 0; b < blocks; ++b) {
    prefetch_block<kFormat>(panel.codes, first + b, kAhead);
    dequantize_block<kFormat>(panel, first + b, to + b * 1024);
  }
}

}  // namespace
}  // namespace edgelora::kernels::amx_bf16
