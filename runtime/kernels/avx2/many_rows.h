// Several rows of x (avx2/linear.cc has formula and layout): up to 4 rows meet 16 rows of W (int8,
// nf4, fp4: 8) at a time, bytes of a chunk unpacked before.
//   low, high [4]       int4: int16 sums of rows 0–7 and 8–15
//   dots [4]            int8, nf4, fp4: int32
//   first, second [4]   nf4, fp4: int16, of 16 K each
//   acc                 float [rows, 16], in L1
#pragma once

#include "kernels/avx2/products.h"

namespace edgelora::kernels {
namespace {

// kRows rows of x times 8 rows of W, one block, in steps of 4 K; i is [block, first row] in the
// tile.
template <int kRows>
struct HalfBlock {
  const uint8_t* w;
  const int8_t* codes;
  HalfBlock(const Chunk& chunk, int64_t b, int half, const RowTile& x, int64_t i)
      : w(chunk.bytes + b * kBlockBytes + half * 32), codes(x.codes + i * kActivationBlock) {}
  __m256i bytes(int q) const { return load_bytes(w + 64 * q); }
  __m256i row(int r, int q) const { return broadcast4(codes + r * kActivationBlock + 4 * q); }
};

// dots of a half block into acc.
template <Format kFormat, int kRows>
void add_dots(const Chunk& chunk, int64_t b, int half, const __m256i (&dots)[kRows],
              const RowTile& x, int64_t i, float* acc) {
  const float* scales = chunk.scales + b * kPanelRows + half * 8;
  const float* extras = chunk.extras + b * kPanelRows + half * 8;
  const HalfScales s{_mm256_load_ps(scales),
                     has_extras(kFormat) ? _mm256_load_ps(extras) : _mm256_setzero_ps()};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float* out = acc + r * kPanelRows + half * 8;
    _mm256_store_ps(out, add_block<kFormat>(_mm256_load_ps(out), dots[r], s, x, i + r));
  }
}

template <Format kFormat, int kRows>
void add_int4(const Chunk& chunk, int64_t b, const RowTile& x, int64_t i, float* acc) {
  const uint8_t* w = chunk.bytes + b * kBlockBytes;
  const int8_t* codes = x.codes + i * kActivationBlock;
  __m256i low[kRows] = {}, high[kRows] = {};
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    const __m256i w0 = load_bytes(w + 64 * q), w1 = load_bytes(w + 64 * q + 32);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256i xr = broadcast4(codes + r * kActivationBlock + 4 * q);
      low[r] = add16(low[r], _mm256_maddubs_epi16(w0, xr));
      high[r] = add16(high[r], _mm256_maddubs_epi16(w1, xr));
      keep_order(&low[r], &high[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) low[r] = widen(low[r], 1), high[r] = widen(high[r], 1);
  add_dots<kFormat, kRows>(chunk, b, 0, low, x, i, acc);
  add_dots<kFormat, kRows>(chunk, b, 1, high, x, i, acc);
}

template <int kRows>
void add_int8_half(const Chunk& chunk, int64_t b, int half, const RowTile& x, int64_t i,
                   float* acc) {
  const HalfBlock<kRows> block(chunk, b, half, x, i);
  __m256i dots[kRows] = {};
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    const __m256i w = block.bytes(q), magnitude = _mm256_abs_epi8(w);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      dots[r] = add32(dots[r], signed_dot(magnitude, w, block.row(r, q)));
      keep_order(&dots[r]);
    }
  }
  add_dots<Format::kInt8, kRows>(chunk, b, half, dots, x, i, acc);
}

template <Format kFormat, int kRows>
void add_levels_half(const Chunk& chunk, int64_t b, int half, const RowTile& x, int64_t i,
                  float* acc) {
  const HalfBlock<kRows> block(chunk, b, half, x, i);
  __m256i dots[kRows], first[kRows], second[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) first[r] = broadcast4(x.starts + (i + r) * 4);
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m256i w = block.bytes(q);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      first[r] = add16(first[r], _mm256_maddubs_epi16(w, block.row(r, q)));
      keep_order(&first[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    dots[r] = add32(widen(first[r], 4), level_term<kFormat>(x.terms[i + r]));
    second[r] = broadcast4(x.starts + (i + r) * 4 + 2);
  }
#pragma GCC unroll 4
  for (int q = 4; q < 8; ++q) {
    const __m256i w = block.bytes(q);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      second[r] = add16(second[r], _mm256_maddubs_epi16(w, block.row(r, q)));
      keep_order(&second[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) dots[r] = add32(dots[r], widen(second[r], 4));
  add_dots<kFormat, kRows>(chunk, b, half, dots, x, i, acc);
}

template <Format kFormat, int kRows>
void add_wide_levels_half(const Chunk& chunk, int64_t b, int half, const RowTile& x, int64_t i,
                       float* acc) {
  const HalfBlock<kRows> block(chunk, b, half, x, i);
  __m256i dots[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) dots[r] = wide_start<kFormat>(x.terms[i + r]);
#pragma GCC unroll 2
  for (int q = 0; q < 8; ++q) {
    const __m256i w = block.bytes(q);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) dots[r] = add32(dots[r], level_dot(w, block.row(r, q)));
  }
  add_dots<kFormat, kRows>(chunk, b, half, dots, x, i, acc);
}

}  // namespace
}  // namespace edgelora::kernels
