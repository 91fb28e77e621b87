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

__m512i emulated_cvtepi8_epi32(__m128i bytes) {
  const __m512 bits =
      join(_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
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
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32

#define avx512_vnni avx512_vnni_emulated
#include "kernels/avx512_vnni/linear.cc"
#include "kernels/avx512_vnni/table.cc"

// AMX: eight tiles of 16 rows of 64 bytes, their products as the manual has them.
namespace {

using Tile = float[16][16];
Tile tiles[8];

void load_tile(Tile& tile, const void* from, int64_t stride) {
  for (int64_t r = 0; r < 16; ++r) {
    std::memcpy(tile[r], static_cast<const char*>(from) + r * stride, sizeof tile[r]);
  }
}

void store_tile_to(const Tile& tile, void* to, int64_t stride) {
  for (int64_t r = 0; r < 16; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile[r], sizeof tile[r]);
  }
}

// A lane holds two bfloat16; odd is 0 or 1.
float bfloat16(float lane, int odd) {
  uint32_t bits;
  std::memcpy(&bits, &lane, sizeof bits);
  bits = odd ? bits & 0xffff0000u : bits << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void multiply_tiles(Tile& c, const Tile& a, const Tile& b) {
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        for (int odd : {0, 1}) c[m][n] += bfloat16(a[m][k], odd) * bfloat16(b[k][n], odd);
      }
    }
  }
}

uint16_t to_bfloat16(float value) {  // half to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

struct Bfloat16s {
  uint16_t of[32];
};

Bfloat16s emulated_cvtne2ps_pbh(__m512 high, __m512 low) {
  float values[32];
  std::memcpy(values, &low, sizeof low);
  std::memcpy(values + 16, &high, sizeof high);
  Bfloat16s out;
  for (int i = 0; i < 32; ++i) out.of[i] = to_bfloat16(values[i]);
  return out;
}

}  // namespace

#define _tile_loadconfig(shapes) static_cast<void>(shapes)
#define _tile_release() static_cast<void>(0)
#undef _tile_zero
#define _tile_zero(t) std::memset(tiles[t], 0, sizeof tiles[t])
#undef _tile_loadd
#define _tile_loadd(t, from, stride) load_tile(tiles[t], from, stride)
#undef _tile_stored
#define _tile_stored(t, to, stride) store_tile_to(tiles[t], to, stride)
#undef _tile_dpbf16ps
#define _tile_dpbf16ps(c, a, b) multiply_tiles(tiles[c], tiles[a], tiles[b])
#define __m512bh Bfloat16s
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh

#define amx_bf16 amx_bf16_emulated
#include "kernels/amx_bf16/linear.cc"
#include "kernels/amx_bf16/table.cc"
