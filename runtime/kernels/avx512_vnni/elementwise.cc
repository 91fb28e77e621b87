// Activations → int8 blocks, the exponentials of a softmax, SwiGLU.
//
//   code = round_half_even(x · inverse) of 32 values, two registers; activation_block.h
//   The same in groups of up to four blocks, whose scales are powers of two apart (magic_steps.h
//   tells what for): scale = most / 127 · 2^−e, most the group's largest amax, of numbers, and e =
//   0…5 as large as it may be while amax ≤ most · 2^−e.
//   e^x = 2^n · p(r), n = round(x / ln 2), r = x − n·ln 2 in two parts; p: Taylor's to r^7/5040, at
//   |r| ≤ 0.347 truncated by 5e-9 of the value: the error is float32's own rounding (≤ 2 ulp).
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels/activation_block.h"
#include "kernels/avx2/registers.h"
#include "kernels/avx512_vnni/avx512_vnni.h"
#include "kernels/panels.h"

namespace edgelora::kernels::avx512_vnni {
namespace {

constexpr int32_t kMostHalvings = 5;  // of a group's scale
constexpr int32_t kMantissaBits = 23;
constexpr float kLowest = -87.0f;  // e^x < 2e-38 below, nothing beside 1
constexpr float kHighest = 89.0f;  // e^x is Inf here already
constexpr float kInverseFactorials[] = {1.0f,      1.0f,       0.5f,       1.0f / 6,
                                        1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};

constexpr int32_t kInf = 0xff << kMantissaBits, kNan = kInf | 1 << 22;

// As integers, magnitudes are in order, Inf and NaN above all numbers.
__m512i magnitude_bits(__m512 v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}

// The lanes of each of four registers put together.
template <class Combine>
__m128i reduce_four(const __m512i of[4], Combine combine) {
  const auto pairs = [&](__m512i v, __m512i w) {  // v01 w01 v23 w23 of each 128 bits
    return combine(_mm512_unpacklo_epi32(v, w), _mm512_unpackhi_epi32(v, w));
  };
  const __m512i ab = pairs(of[0], of[1]), cd = pairs(of[2], of[3]);
  __m512i all = combine(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  all = combine(all, _mm512_shuffle_i32x4(all, all, 0x4e));
  return _mm512_castsi512_si128(combine(all, _mm512_shuffle_i32x4(all, all, 0xb1)));
}

template <int kCount>
void store_first(__m128i lanes, void* to) {
  int32_t all[4];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(all), lanes);
  std::memcpy(to, all, kCount * sizeof all[0]);
}

struct FourScales {
  __m128 scale;
  __m128 inverse;
};

// Which of four blocks have a scale that is neither 0 nor NaN, and the NaN of those that have it.
struct FourKinds {
  __m128i usual, nan;
};

FourKinds four_kinds_of(__m128i amax) {
  const __m128i finite = _mm_cmplt_epi32(amax, _mm_set1_epi32(kInf));
  const __m128i tiny = _mm_cmplt_epi32(amax, _mm_castps_si128(_mm_set1_ps(kSmallestAmax)));
  return {_mm_andnot_si128(tiny, finite), _mm_andnot_si128(finite, _mm_set1_epi32(kNan))};
}

FourScales masked(const FourKinds& kinds, __m128i scale, __m128i inverse) {
  return {_mm_castsi128_ps(_mm_or_si128(_mm_and_si128(kinds.usual, scale), kinds.nan)),
          _mm_castsi128_ps(_mm_and_si128(kinds.usual, inverse))};
}

// block_scale_of of four.
struct Alone {
  static FourScales scales_of(__m128i amax_bits) {
    const __m128 amax = _mm_castsi128_ps(amax_bits), steps = _mm_set1_ps(127.0f);
    return masked(four_kinds_of(amax_bits), _mm_castps_si128(_mm_div_ps(amax, steps)),
                  _mm_castps_si128(_mm_div_ps(steps, amax)));
  }
};

// As integers, an amax of at most `most` · 2^−e lies e exponents or more below `most`.
struct Grouped {
  static FourScales scales_of(__m128i amax) {
    const FourKinds kinds = four_kinds_of(amax);
    const __m128i most = largest_lane(_mm_and_si128(kinds.usual, amax));
    const __m128i e = _mm_min_epi32(_mm_srai_epi32(_mm_sub_epi32(most, amax), kMantissaBits),
                                    _mm_set1_epi32(kMostHalvings));
    const __m128i exponents = _mm_slli_epi32(e, kMantissaBits);
    const __m128 top = _mm_castsi128_ps(most), steps = _mm_set1_ps(127.0f);
    return masked(kinds,
                  _mm_sub_epi32(_mm_castps_si128(_mm_div_ps(top, steps)), exponents),
                  _mm_add_epi32(_mm_castps_si128(_mm_div_ps(steps, top)), exponents));
  }
};

// Up to four blocks at a time: what goes across lanes costs most.
template <class Scales, int kCount>
void quantize_blocks(const float* x, int8_t* codes, float* scales, int32_t* sums) {
  __m512i sizes[4] = {}, totals[4] = {};
  for (int b = 0; b < kCount; ++b) {
    const float* from = x + b * kActivationBlock;
    sizes[b] = _mm512_max_epi32(magnitude_bits(_mm512_loadu_ps(from)),
                                magnitude_bits(_mm512_loadu_ps(from + 16)));
  }
  const FourScales s = Scales::scales_of(
      reduce_four(sizes, [](__m512i v, __m512i w) { return _mm512_max_epi32(v, w); }));
  store_first<kCount>(_mm_castps_si128(s.scale), scales);
  const __m512 inverses = _mm512_castps128_ps512(s.inverse);
  for (int b = 0; b < kCount; ++b) {
    const float* from = x + b * kActivationBlock;
    const __m512 inverse = _mm512_permutexvar_ps(_mm512_set1_epi32(b), inverses);
    const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from), inverse));
    const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + 16), inverse));
    auto* to = reinterpret_cast<__m128i*>(codes + b * kActivationBlock);
    _mm_storeu_si128(to, _mm512_cvtepi32_epi8(low));  // Inf · 0: 0x80000000, whose last byte is 0
    _mm_storeu_si128(to + 1, _mm512_cvtepi32_epi8(high));
    totals[b] = _mm512_add_epi32(low, high);
  }
  const __m128i sum =
      reduce_four(totals, [](__m512i v, __m512i w) { return _mm512_add_epi32(v, w); });
  const __m128i some = _mm_castps_si128(_mm_cmpneq_ps(s.inverse, _mm_setzero_ps()));
  store_first<kCount>(_mm_and_si128(some, sum), sums);
}

template <class Scales>
void quantize_four(const float* x, int64_t blocks, int8_t* codes, float* scales, int32_t* sums) {
  switch (blocks) {
    case 1: return quantize_blocks<Scales, 1>(x, codes, scales, sums);
    case 2: return quantize_blocks<Scales, 2>(x, codes, scales, sums);
    case 3: return quantize_blocks<Scales, 3>(x, codes, scales, sums);
    default: return quantize_blocks<Scales, 4>(x, codes, scales, sums);
  }
}

template <class Scales>
void quantize_row(const float* x, int64_t in_features, int8_t* codes, float* scales,
                  int32_t* sums) {
  constexpr int64_t kGroup = kGroupBlocks * kActivationBlock;
  for (int64_t k = 0, b = 0; k < in_features; k += kGroup, b += kGroupBlocks) {
    const int64_t count = min_of(kGroup, in_features - k);
    const int64_t blocks = ceil_div(count, kActivationBlock);
    if (count % kActivationBlock == 0) {
      quantize_four<Scales>(x + k, blocks, codes + k, scales + b, sums + b);
      continue;
    }
    float padded[kGroup] = {};
    std::memcpy(padded, x + k, static_cast<size_t>(count) * sizeof(float));
    quantize_four<Scales>(padded, blocks, codes + k, scales + b, sums + b);
  }
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
  quantize_row<Alone>(x, in_features, codes, scales, sums);
}

void quantize_groups(const float* x, int64_t in_features, int8_t* codes, float* scales,
                     int32_t* sums) {
  quantize_row<Grouped>(x, in_features, codes, scales, sums);
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
