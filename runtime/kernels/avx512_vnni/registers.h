// 512-bit registers: each is the 16 rows of a panel.
#pragma once

#include <immintrin.h>

#include "kernels/vnni_linear.h"

#ifndef EDGELORA_KEEP  // nothing where registers are emulated
#define EDGELORA_KEEP(sum) __asm__("" : "+v"(sum))
#endif

namespace edgelora::kernels::avx512_vnni {
namespace {

struct Registers {
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int kParts = 1;
  static constexpr int kBytes = 64;
  static constexpr int kGroupRows = 12;
  static constexpr int kFewRows = 12;

  static Ints load(const void* from) { return _mm512_loadu_si512(from); }
  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(uint8_t* to, Ints v) { _mm512_storeu_si512(to, v); }
  static void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
  static Ints zero() { return _mm512_setzero_si512(); }
  static Floats zero_floats() { return _mm512_setzero_ps(); }
  static Ints broadcast(int32_t value) { return _mm512_set1_epi32(value); }
  static Floats broadcast(float value) { return _mm512_set1_ps(value); }

  static Ints broadcast4(const int8_t* from) {
    int32_t word;
    std::memcpy(&word, from, sizeof word);
    return _mm512_set1_epi32(word);
  }

  static Ints low_nibbles(Ints bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
  static Ints high_nibbles(Ints bytes) { return low_nibbles(_mm512_srli_epi16(bytes, 4)); }
  static Ints flip(Ints bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }

  template <Format kFormat>
  static Ints look_up(Ints codes) {
    const __m128i bytes = _mm_loadu_si128(as_m128(codebook(kFormat).bytes));
    const __m128i table = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
  }

  static Ints dot(Ints sum, Ints w, Ints x) { return _mm512_dpbusd_epi32(sum, w, x); }
  // Keeps a sum in its register: GCC would copy it to another in each turn of a loop, and back.
  static void keep(Ints* sum) { EDGELORA_KEEP(*sum); }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
  static Floats as_floats(Ints v) { return _mm512_castsi512_ps(v); }
  static Ints as_ints(Floats v) { return _mm512_castps_si512(v); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }

  struct Scales {  // of 16 rows for one scale block
    Floats scale;
    Floats extra;
  };

  static Floats load_halves(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  template <Format kFormat>
  static Scales scales(const PanelView& panel, int64_t b, int) {
    const int64_t i = b >> panel.shift;
    Scales s{zero_floats(), zero_floats()};
    s.scale = load_halves(panel.scales + i * 16);
    if constexpr (kFormat == Format::kInt4Offsets) s.extra = load_halves(panel.offsets + i * 16);
    if constexpr (kFormat == Format::kInt4ZeroPoints) {
      const __m128i packed = _mm_loadl_epi64(as_m128(panel.zero_points + i * 8));
      const __m128i low = _mm_and_si128(packed, _mm_set1_epi8(15));
      const __m128i high = _mm_and_si128(_mm_srli_epi16(packed, 4), _mm_set1_epi8(15));
      s.extra = to_float(_mm512_cvtepu8_epi32(_mm_unpacklo_epi64(low, high)));
    }
    return s;
  }
};

}  // namespace
}  // namespace edgelora::kernels::avx512_vnni
