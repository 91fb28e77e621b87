// Activations → int8 blocks.
//
//   code = round_half_even(x · (127 / amax)) of 32 values, four registers; activation_block.h
#include "kernels/activation_block.h"
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/registers.h"

namespace edgelora::kernels::avx2 {
namespace {

__m256 magnitude(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

float largest_lane(__m256 v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

int32_t sum_lanes(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

int32_t quantize_full_block(const float* x, int8_t* codes, float* scale) {
  __m256 v[4];
  __m256 amax = _mm256_setzero_ps(), odd = amax;
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_loadu_ps(x + 8 * i);
    const __m256 size = magnitude(v[i]);
    amax = _mm256_max_ps(amax, size);
    odd = _mm256_or_ps(odd, _mm256_cmp_ps(size, _mm256_set1_ps(kLargestFinite), _CMP_NLE_UQ));
  }
  const BlockScale block = block_scale_of(largest_lane(amax), _mm256_movemask_ps(odd) == 0);
  *scale = block.scale;
  __m256i words[4];
  for (int i = 0; i < 4; ++i) {
    words[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], _mm256_set1_ps(block.inverse)));
  }
  // Packing works within 128-bit halves; the permutation undoes their interleaving.
  const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(words[0], words[1]),
                                           _mm256_packs_epi32(words[2], words[3]));
  __m256i bytes = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  if (block.inverse == 0.0f) bytes = _mm256_setzero_si256();  // Inf · 0 is no code
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
  return sum_lanes(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

}  // namespace

void quantize_activations(const float* x, int64_t in_features, int8_t* codes, float* scales,
                          int32_t* sums) {
  quantize_blocks<quantize_full_block>(x, in_features, codes, scales, sums);
}

}  // namespace edgelora::kernels::avx2
