// Several rows of x (avx2/linear.cc has formula and layout), bytes of a chunk unpacked before:
//   int4        4 rows meet 16 rows of W; low, high [4]: int16 sums of rows 0–7 and 8–15
//   nf4, fp4    2 rows meet 16; low, high [2]: int16, of 16 K; low_dots, high_dots [2]: int32
//   int8, and nf4 and fp4 where |x| may add up to too much: 4 rows meet 8; dots [4]: int32
//   acc         float [rows, 16], in L1
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
EDGELORA_INLINE void add_int8_half(const Chunk& chunk, int64_t b, int half, const RowTile& x,
                                   int64_t i, float* acc) {
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

// int16 sums of 16 K, lines q … q + 3 of a chunk's block, of 16 rows of W.
template <int kRows>
EDGELORA_INLINE void add_levels_lines(const uint8_t* w, const int8_t* codes, int q,
                                      __m256i (&low)[kRows], __m256i (&high)[kRows]) {
#pragma GCC unroll 4
  for (int end = q + 4; q < end; ++q) {
    __m256i w0 = load_bytes(w + 64 * q), w1 = load_bytes(w + 64 * q + 32);
    keep_order(&w0, &w1);  // loaded once for all rows
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const __m256i xr = broadcast4(codes + r * kActivationBlock + 4 * q);
      low[r] = add16(low[r], _mm256_maddubs_epi16(w0, xr));
      high[r] = add16(high[r], _mm256_maddubs_epi16(w1, xr));
      keep_order(&low[r], &high[r]);
    }
  }
}

// Both halves at once, since a load of x is as dear as a product; so two rows are all that fits.
template <Format kFormat, int kRows>
EDGELORA_INLINE void add_levels(const Chunk& chunk, int64_t b, const RowTile& x, int64_t i,
                                float* acc) {
  const uint8_t* w = chunk.bytes + b * kBlockBytes;
  const int8_t* codes = x.codes + i * kActivationBlock;
  __m256i low[kRows], high[kRows], low_dots[kRows], high_dots[kRows];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) low[r] = high[r] = broadcast4(x.starts + (i + r) * 4);
  add_levels_lines<kRows>(w, codes, 0, low, high);
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    const __m256i term = level_term<kFormat>(x.terms[i + r]);
    low_dots[r] = add32(widen(low[r], 4), term);
    high_dots[r] = add32(widen(high[r], 4), term);
    low[r] = high[r] = broadcast4(x.starts + (i + r) * 4 + 2);
  }
  add_levels_lines<kRows>(w, codes, 4, low, high);
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    low_dots[r] = add32(low_dots[r], widen(low[r], 4));
    high_dots[r] = add32(high_dots[r], widen(high[r], 4));
  }
  add_dots<kFormat, kRows>(chunk, b, 0, low_dots, x, i, acc);
  add_dots<kFormat, kRows>(chunk, b, 1, high_dots, x, i, acc);
}

template <Format kFormat, int kRows>
EDGELORA_INLINE void add_levels_by_two(const Chunk& chunk, int64_t b, const RowTile& x, int64_t i,
                                       float* acc) {
#pragma GCC unroll 2
  for (int r = 0; r + 2 <= kRows; r += 2) {
    add_levels<kFormat, 2>(chunk, b, x, i + r, acc + r * kPanelRows);
  }
  if constexpr (kRows % 2 == 1) {
    add_levels<kFormat, 1>(chunk, b, x, i + kRows - 1, acc + (kRows - 1) * kPanelRows);
  }
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
