// Loads, broadcasts, sums and maxima that the files of avx2 and wider ISAs share.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace edgelora::kernels {
namespace {

inline __m256i load_bytes(const void* from) {  // 32, unaligned
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

inline __m256 load_half8(const void* from) {  // 8 float16, unaligned
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

inline void store_half16(const float* from, uint16_t* to) {  // 16 floats as float16
  for (int i = 0; i < 16; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
}

inline __m256 load_float8(const void* from) {  // unaligned, even to 1 byte
  return _mm256_castsi256_ps(load_bytes(from));
}

inline __m256i broadcast4(const void* from) {  // the same 4 bytes in every 32-bit lane
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return _mm256_set1_epi32(word);
}

inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

inline __m128i largest_lane(__m128i v) {  // in all four
  v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4e));
  return _mm_max_epi32(v, _mm_shuffle_epi32(v, 0xb1));
}

inline float sum_lanes(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

}  // namespace
}  // namespace edgelora::kernels
