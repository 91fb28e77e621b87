// y[m, n] = Σ_b xscale[m, b] · (scale[n, b] · dot_b [+ offset[n, b] · sum_b]),  b: blocks of 32 of
// K
//
// Codes of 16 rows × 8 K, int4 and nf4, 64 bytes, one register:
//     │ r0: K0 K1 K2 K3 │ r1: K0 … │ … │ r15 │     low nibbles; the high nibbles are K4 … K7
// vpdpbusd adds four unsigned·signed byte products to each 32-bit lane, and a lane is a row of W:
//     dot[r] += Σ_j code[r, j]·x[j],  x broadcast, 4 bytes from memory
//
// int4: codes as they are, the sum starts at −8·Σx (zero points: zp·Σx is subtracted at the end).
// int8: code xor 0x80 = code + 128 is unsigned, the sum starts at −128·Σx.
// nf4: a byte table, vpshufb, of round(127·value) + 128, the sum starts at −128·Σx. The rounding
// costs
//   at most 1/254 of absmax a weight (measured mean KL of a model 0.0015, beside 0.0027 for int8
//   activations).
//
// Tile: 8 registers of codes, 16 rows × 32 K, used for all rows of x of the tile (up to 32).
//   even, odd   int32, the block's dots: two chains, to hide vpdpbusd's latency
//   acc         float; a register for one row of x, [rows, 16] in L1 for several
#include <immintrin.h>

#include "kernels/avx512_vnni/avx512_vnni.h"
#include "kernels/linear_driver.h"

namespace edgelora::kernels::avx512_vnni {
namespace {

constexpr bool wide_codes(Format format) { return format == Format::kInt8; }

__m512i load_line(const void* from) { return _mm512_loadu_si512(from); }

__m512i low_nibbles(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }

__m512 load_half16(const void* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}

__m512i broadcast4(const int8_t* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return _mm512_set1_epi32(word);
}

__m512i nf4_bytes(__m512i codes) {
  const __m128i table = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kNf4Bytes)),
                                      _mm_set1_epi8(-128));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}

// Eight registers of unsigned bytes: 16 rows × 32 K.
struct Codes {
  __m512i of[8];
};

template <Format kFormat>
Codes unpack(const uint8_t* panel_codes, int64_t b) {
  Codes out;
  if constexpr (wide_codes(kFormat)) {
    const uint8_t* codes = panel_codes + b * 512;
    for (int q = 0; q < 8; ++q) {
      out.of[q] = _mm512_xor_si512(load_line(codes + 64 * q), _mm512_set1_epi8(-128));
    }
    return out;
  }
  const uint8_t* codes = panel_codes + b * 256;
  for (int q = 0; q < 4; ++q) {
    const __m512i bytes = load_line(codes + 64 * q);
    out.of[2 * q] = low_nibbles(bytes);
    out.of[2 * q + 1] = low_nibbles(_mm512_srli_epi16(bytes, 4));
  }
  if constexpr (kFormat == Format::kNf4) {
    for (__m512i& codes_of : out.of) codes_of = nf4_bytes(codes_of);
  }
  return out;
}

struct Scales {  // of 16 rows for one scale block
  __m512 scale;
  __m512 offset;        // kInt4Offsets
  __m512i zero_points;  // kInt4ZeroPoints, int32 lanes
};

template <Format kFormat>
Scales load_scales(const PanelView& panel, int64_t b) {
  const int64_t i = b >> panel.shift;
  Scales s{_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_si512()};
  if constexpr (kFormat == Format::kNf4) {
    s.scale = _mm512_loadu_ps(panel.absmax + i * 16);
  } else {
    s.scale = load_half16(panel.scales + i * 16);
  }
  if constexpr (kFormat == Format::kInt4Offsets) s.offset = load_half16(panel.offsets + i * 16);
  if constexpr (kFormat == Format::kInt4ZeroPoints) {
    const __m128i packed =
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(panel.zero_points + i * 8));
    const __m128i low = _mm_and_si128(packed, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(packed, 4), _mm_set1_epi8(15));
    s.zero_points = _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(low, high));
  }
  return s;
}

// acc + one block's contribution for one row of x; i is [block, row] in the tile's small arrays.
template <Format kFormat>
__m512 add_block(__m512 acc, const Codes& w, const Scales& s, const RowTile& x, int64_t i) {
  const int8_t* codes = x.codes + i * kActivationBlock;
  __m512i even = _mm512_setzero_si512(), odd = even;
  if constexpr (kFormat == Format::kInt4Offsets) {
    acc = _mm512_fmadd_ps(s.offset, _mm512_set1_ps(x.shifts[i]), acc);
  } else if constexpr (kFormat == Format::kInt4ZeroPoints) {
    // zp < 16 leaves the upper 16 bits zero, and |Σx| ≤ 4064 fits the lower ones: madd multiplies.
    const __m512i product = _mm512_madd_epi16(s.zero_points, _mm512_set1_epi32(x.terms[i]));
    even = _mm512_sub_epi32(even, product);
  } else {
    even = _mm512_set1_epi32(x.terms[i]);  // already negative: term_factor
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    even = _mm512_dpbusd_epi32(even, w.of[2 * q], broadcast4(codes + 8 * q));
    odd = _mm512_dpbusd_epi32(odd, w.of[2 * q + 1], broadcast4(codes + 8 * q + 4));
  }
  const __m512 scale = _mm512_mul_ps(s.scale, _mm512_set1_ps(x.scales[i]));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)), scale, acc);
}

template <Format kFormat>
void one_row(const PanelView& panel, const RowTile& x, float* acc) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t b = 0; b < panel.blocks; ++b) {
    const Codes w = unpack<kFormat>(panel.codes, b);
    sum = add_block<kFormat>(sum, w, load_scales<kFormat>(panel, b), x, b);
  }
  _mm512_store_ps(acc, sum);
}

template <Format kFormat>
void many_rows(const PanelView& panel, const RowTile& x, float* acc) {
  for (int64_t i = 0; i < x.rows * kPanelRows; ++i) acc[i] = 0.0f;
  for (int64_t b = 0; b < panel.blocks; ++b) {
    const Codes w = unpack<kFormat>(panel.codes, b);
    const Scales scales = load_scales<kFormat>(panel, b);
    for (int64_t m = 0; m < x.rows; ++m) {
      float* out = acc + m * kPanelRows;
      _mm512_store_ps(out, add_block<kFormat>(_mm512_load_ps(out), w, scales, x, b * x.rows + m));
    }
  }
}

struct Isa {
  static int32_t term_factor(Format format) {
    switch (format) {
      case Format::kInt4:
        return -8;
      case Format::kInt4ZeroPoints:
        return 1;
      case Format::kInt4Offsets:
      case Format::kFloat:
        return 0;
      case Format::kInt8:
      case Format::kNf4:
        return -128;
    }
    return 0;
  }

  template <Format kFormat>
  static void panel(const PanelView& view, const RowTile& x, float* acc) {
    if (x.rows == 1) {
      one_row<kFormat>(view, x, acc);
    } else {
      many_rows<kFormat>(view, x, acc);
    }
  }
};

}  // namespace

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch) {
  drive_linear<Isa>(weights, x, panel_begin, panel_end, y, y_stride, scratch);
}

}  // namespace edgelora::kernels::avx512_vnni
