// `linear` in 256-bit registers: two registers are the 16 rows of a panel. vnni_linear.h has the
// rest. 5 rows of x at a time: 10 chains of vpdpbusd, two registers of codes and one of x.
#include <immintrin.h>

#include "kernels/avx_vnni/avx_vnni.h"
#include "kernels/absmax_scales.h"
#include "kernels/vnni_linear.h"

namespace edgelora::kernels::avx_vnni {
namespace {

struct Registers {
  using Ints = __m256i;
  using Floats = __m256;
  static constexpr int kParts = 2;
  static constexpr int kBytes = 32;
  static constexpr int kGroupRows = 5;
  static constexpr int kFewRows = 1;  // a block's codes are eight registers

  static Ints load(const void* from) { return load_bytes(from); }
  static Floats load(const float* from) { return load_float8(from); }
  static void store(uint8_t* to, Ints v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
  }
  static void store(float* to, Floats v) { _mm256_storeu_ps(to, v); }
  static Ints zero() { return _mm256_setzero_si256(); }
  static Floats zero_floats() { return _mm256_setzero_ps(); }
  static Ints broadcast(int32_t value) { return _mm256_set1_epi32(value); }
  static Floats broadcast(float value) { return _mm256_set1_ps(value); }
  static Ints broadcast4(const int8_t* from) { return kernels::broadcast4(from); }

  static Ints low_nibbles(Ints bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
  static Ints high_nibbles(Ints bytes) { return low_nibbles(_mm256_srli_epi16(bytes, 4)); }
  static Ints flip(Ints bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)); }

  template <Format kFormat>
  static Ints look_up(Ints codes) {
    const __m128i bytes = _mm_loadu_si128(as_m128(codebook(kFormat).bytes));
    const __m128i table = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
  }

  static Ints dot(Ints sum, Ints w, Ints x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
  static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static Floats to_float(Ints v) { return _mm256_cvtepi32_ps(v); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats fmadd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats fnmadd(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }

  template <Format kFormat>
  static HalfScales scales(const PanelView& panel, int64_t b, int half) {
    return load_scales<kFormat>(panel, b, half);
  }
};

}  // namespace

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch) {
  drive_row_groups<VnniIsa<Registers>>(weights, x, panel_begin, panel_end, y, y_stride, scratch);
}

void unpack_absmax(const Weights& weights, int64_t panel, uint16_t* scales, void* scratch) {
  unpack_absmax_panel(weights, panel, codebook(weights.format).byte_scale, store_half16, scales,
                      scratch);
}

}  // namespace edgelora::kernels::avx_vnni
