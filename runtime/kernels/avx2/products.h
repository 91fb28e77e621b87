// Products of bytes and a block's contribution to y: what avx2's linear does for one row and for
// many.
#pragma once

#include "kernels/avx2/row_groups.h"

namespace edgelora::kernels {
namespace {

constexpr int64_t kInt4BlockBytes = 256;  // codes of 16 rows × 32 K

inline __m256i low_nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

inline __m256i high_nibbles(__m256i bytes) { return low_nibbles(_mm256_srli_epi16(bytes, 4)); }

// Keeps additions where they stand: GCC would make all products first, and spill most of them.
inline void keep_order(__m256i* a) { __asm__("" : "+x"(*a)); }
inline void keep_order(__m256i* a, __m256i* b) { __asm__("" : "+x"(*a), "+x"(*b)); }

inline __m256i add16(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
inline __m256i add32(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }

inline __m256i widen(__m256i pairs, int16_t factor) {
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(factor));
}

template <Format kFormat>
__m256i levels(__m256i codes) {
  const __m128i table = _mm_loadu_si128(as_m128(codebook(kFormat).levels));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}

// Σ w·x of each 32-bit lane, w signed bytes.
inline __m256i signed_dot(__m256i magnitude, __m256i w, __m256i x) {
  return widen(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w)), 1);
}

// 4·Σ level·x of each 32-bit lane.
inline __m256i level_dot(__m256i w, __m256i x) { return widen(_mm256_maddubs_epi16(w, x), 4); }

// acc + the block's contribution; i is [block, row] in the tile's small arrays.
template <Format kFormat>
__m256 add_block(__m256 acc, __m256i dot, const HalfScales& s, const RowTile& x, int64_t i) {
  if constexpr (kFormat == Format::kInt4) {
    dot = _mm256_sub_epi32(dot, _mm256_set1_epi32(x.terms[i]));
  } else if constexpr (kFormat == Format::kInt4Offsets) {
    acc = fma(s.extra, _mm256_set1_ps(x.shifts[i]), acc);
  }
  __m256 product = _mm256_cvtepi32_ps(dot);
  if constexpr (kFormat == Format::kInt4ZeroPoints) {
    product = _mm256_fnmadd_ps(s.extra, _mm256_set1_ps(x.shifts[i]), product);
  }
  return fma(product, _mm256_mul_ps(s.scale, _mm256_set1_ps(x.scales[i])), acc);
}

// (256 − level_offset)·Σx, from Σx: what sums of 4·(level − 64)·x lack.
template <Format kFormat>
__m256i level_term(int32_t sum) {
  return _mm256_set1_epi32((256 - codebook(kFormat).level_offset) * sum);
}

// −level_offset·Σx, from Σx: what a sum of 4·level·x lacks.
template <Format kFormat>
__m256i wide_start(int32_t sum) {
  return _mm256_set1_epi32(-codebook(kFormat).level_offset * sum);
}

}  // namespace
}  // namespace edgelora::kernels
