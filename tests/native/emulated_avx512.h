// AVX-512 intrinsics that SIMDe lacks, and AMX: with these the sources of those ISAs compile for
// AVX2. Included after SIMDe, before a kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#define EDGELORA_KEEP(sum) static_cast<void>(sum)

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

// Lane by lane.
namespace {

struct FloatLanes {
  float of[16];
  explicit FloatLanes(__m512 v) { std::memcpy(of, &v, sizeof of); }
  operator __m512() const {
    __m512 v;
    std::memcpy(&v, of, sizeof v);
    return v;
  }
};

struct IntLanes {
  int32_t of[16];
  explicit IntLanes(__m512i v) { std::memcpy(of, &v, sizeof of); }
};

float emulated_reduce_max_ps(__m512 v) {
  const FloatLanes lanes(v);
  return *std::max_element(lanes.of, lanes.of + 16);
}

float emulated_reduce_add_ps(__m512 v) {
  float sum = 0.0f;
  for (float lane : FloatLanes(v).of) sum += lane;
  return sum;
}

__m512i emulated_cvtps_epi32(__m512 v) {
  __m256 half[2];
  std::memcpy(half, &v, sizeof v);
  const __m256i low = _mm256_cvtps_epi32(half[0]), high = _mm256_cvtps_epi32(half[1]);
  __m512i out;
  std::memcpy(&out, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&out) + sizeof low, &high, sizeof high);
  return out;
}

__m128i emulated_cvtepi32_epi8(__m512i v) {
  int8_t bytes[16];
  const IntLanes lanes(v);
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<int8_t>(lanes.of[i]);
  __m128i out;
  std::memcpy(&out, bytes, sizeof out);
  return out;
}

__m512 emulated_round(__m512 v) {
  FloatLanes lanes(v);
  for (float& lane : lanes.of) lane = std::nearbyint(lane);
  return lanes;
}

__m512 emulated_maskz_scalef_ps(uint32_t mask, __m512 v, __m512 power) {
  FloatLanes lanes(v);
  const FloatLanes powers(power);
  for (int i = 0; i < 16; ++i) {
    const float power_of_two = powers.of[i];  // of a NaN it does not matter
    const int n = std::isnan(power_of_two) ? 0 : static_cast<int>(power_of_two);
    lanes.of[i] = (mask >> i & 1u) != 0 ? std::ldexp(lanes.of[i], n) : 0.0f;
  }
  return lanes;
}

uint16_t emulated_not_less(__m512 a, __m512 b) {
  const FloatLanes x(a), y(b);
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) {
    if (!(x.of[i] < y.of[i])) mask |= 1u << i;
  }
  return static_cast<uint16_t>(mask);
}

__m512 emulated_mask_loadu_ps(__m512 other, uint32_t mask, const float* from) {
  FloatLanes lanes(other);
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1u) != 0) lanes.of[i] = from[i];
  }
  return lanes;
}

void emulated_mask_storeu_ps(float* to, uint32_t mask, __m512 v) {
  const FloatLanes lanes(v);
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1u) != 0) to[i] = lanes.of[i];
  }
}

// The second operand where either is NaN.
__m512 emulated_max_ps(__m512 a, __m512 b) {
  const FloatLanes x(a);
  FloatLanes y(b);
  for (int i = 0; i < 16; ++i) y.of[i] = x.of[i] > y.of[i] ? x.of[i] : y.of[i];
  return y;
}

__m512 emulated_min_ps(__m512 a, __m512 b) {
  const FloatLanes x(a);
  FloatLanes y(b);
  for (int i = 0; i < 16; ++i) y.of[i] = x.of[i] < y.of[i] ? x.of[i] : y.of[i];
  return y;
}

}  // namespace

#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated_reduce_add_ps
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#undef _mm512_maskz_scalef_ps
#define _mm512_maskz_scalef_ps emulated_maskz_scalef_ps
#undef _mm512_mask_loadu_ps
#define _mm512_mask_loadu_ps emulated_mask_loadu_ps
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#undef _mm512_max_ps
#define _mm512_max_ps emulated_max_ps
#undef _mm512_min_ps
#define _mm512_min_ps emulated_min_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(v, mode) emulated_round(v)
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, predicate) emulated_not_less(a, b)
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(mask, from) emulated_mask_loadu_ps(_mm512_setzero_ps(), mask, from)

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
