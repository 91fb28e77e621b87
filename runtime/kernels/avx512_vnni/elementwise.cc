// Activations → int8 blocks, the exponentials of a softmax, SwiGLU.
//
//   code = round_half_even(x · (127 / amax)) of 32 values, two registers; activation_block.h
//   e^x = 2^n · p(r), n = round(x / ln 2), r = x − n·ln 2 in two parts; p: Taylor's to r^7/5040, at
//   |r| ≤ 0.347 truncated by 5e-9 of the value: the error is float32's own rounding (≤ 2 ulp).
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels/activation_block.h"
#include "kernels/avx512_vnni/avx512_vnni.h"

namespace edgelora::kernels::avx512_vnni {
namespace {

constexpr float kLowest = -87.0f;  // e^x < 2e-38 below, nothing beside 1
constexpr float kHighest = 89.0f;  // e^x is Inf here already
constexpr float kInverseFactorials[] = {1.0f,      1.0f,       0.5f,       1.0f / 6,
                                        1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};

__m512i magnitude_bits(__m512 v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}

// As integers, magnitudes are in order, Inf and NaN above all numbers.
BlockScale scale_of(__m512 low, __m512 high) {
  const int32_t bits =
      _mm512_reduce_max_epi32(_mm512_max_epi32(magnitude_bits(low), magnitude_bits(high)));
  float amax;
  std::memcpy(&amax, &bits, sizeof amax);
  return block_scale_of(amax, bits < 0x7f800000);
}

int32_t quantize_full_block(const float* x, int8_t* codes, float* scale) {
  const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
  const BlockScale block = scale_of(low, high);
  *scale = block.scale;
  if (block.inverse == 0.0f) {  // Inf · 0 is no code
    std::memset(codes, 0, kActivationBlock);
    return 0;
  }
  const __m512 inverse = _mm512_set1_ps(block.inverse);
  const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
  const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(first));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtepi32_epi8(second));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
}

// NaN stays NaN: min and max return their second operand then. 0 below kLowest.
__m512 exp16(__m512 x) {
  const __m512 bounded =
      _mm512_max_ps(_mm512_set1_ps(kLowest), _mm512_min_ps(_mm512_set1_ps(kHighest), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), bounded);  // exact
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(kInverseFactorials[7]);
  for (int i = 6; i >= 0; --i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kInverseFactorials[i]));
  const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kLowest), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(some, p, n);
}

__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
}

}  // namespace

void quantize_activations(const float* x, int64_t in_features, int8_t* codes, float* scales,
                          int32_t* sums) {
  const int64_t full = in_features / kActivationBlock;
  for (int64_t b = 0; b < full; ++b) {
    const int64_t k = b * kActivationBlock;
    sums[b] = quantize_full_block(x + k, codes + k, scales + b);
  }
  const int64_t k = full * kActivationBlock;
  if (k < in_features) {
    sums[full] = quantize_block(x + k, in_features - k, codes + k, scales + full);
  }
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512 g = _mm512_maskz_loadu_ps(lanes, gate + i);
    const __m512 divisor = _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), g)));
    const __m512 u = _mm512_maskz_loadu_ps(lanes, up + i);
    _mm512_mask_storeu_ps(out + i, lanes, _mm512_mul_ps(_mm512_div_ps(g, divisor), u));
  }
}

float largest(const float* x, int64_t n) {
  const __m512 lowest = _mm512_set1_ps(-HUGE_VALF);
  __m512 most = lowest;
  for (int64_t i = 0; i < n; i += 16) {  // max keeps its second operand beside a NaN
    most = _mm512_max_ps(_mm512_mask_loadu_ps(lowest, first_lanes(n - i), x + i), most);
  }
  return _mm512_reduce_max_ps(most);
}

float exp_minus(float* x, int64_t n, float most) {
  const __m512 shift = _mm512_set1_ps(most);
  __m512 sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512 v = _mm512_mask_loadu_ps(_mm512_set1_ps(-HUGE_VALF), lanes, x + i);
    const __m512 e = exp16(_mm512_sub_ps(v, shift));
    _mm512_mask_storeu_ps(x + i, lanes, e);
    sums = _mm512_add_ps(sums, _mm512_maskz_mov_ps(lanes, e));
  }
  return _mm512_reduce_add_ps(sums);
}

}  // namespace edgelora::kernels::avx512_vnni
