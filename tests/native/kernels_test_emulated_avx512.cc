// The avx512_vnni sources once more, their intrinsics SIMDe's: the very same code runs on a CPU without
// AVX-512, in a namespace of its own beside the native table. Compiled with AVX2's flags.
#include <immintrin.h>

#include <cstring>

#define SIMDE_ENABLE_NATIVE_ALIASES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#define SIMDE_NO_INLINE
#include <simde/x86/avx512.h>
#pragma GCC diagnostic pop

// What SIMDe lacks, in two halves.
namespace {

template <class Half>
__m512 join(Half low, Half high) {
  __m512 out;
  std::memcpy(&out, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&out) + sizeof low, &high, sizeof high);
  return out;
}

__m512 emulated_cvtph_ps(__m256i halves) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
              _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
}

__m512 emulated_cvtepi32_ps(__m512i integers) {
  __m256i half[2];
  std::memcpy(half, &integers, sizeof half);
  return join(_mm256_cvtepi32_ps(half[0]), _mm256_cvtepi32_ps(half[1]));
}

__m512i emulated_cvtepu8_epi32(__m128i bytes) {
  const __m512 bits =
      join(_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)));
  __m512i out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

}  // namespace

#undef _mm512_madd_epi16  // SIMDe 0.7.4 aliases it with a mask's parameters
#define _mm512_madd_epi16 simde_mm512_madd_epi16
#undef _mm512_cvtph_ps
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32

#define avx512_vnni avx512_vnni_emulated
#include "kernels/avx512_vnni/linear.cc"
#include "kernels/avx512_vnni/table.cc"
