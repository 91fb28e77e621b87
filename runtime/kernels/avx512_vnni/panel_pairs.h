// Several rows of x where a scale of W holds for more than one block of x: two panels at a time.
// What is broadcast of x serves both, and 6 rows' dots and sums with 32 rows of W fill 24 of the 32
// registers. A last panel alone is computed likewise: what y is must not depend on where a thread's
// panels end.
//   dots [rows][panels]   int32, of one block: as many chains of vpdpbusd
//   sums [rows][panels]   float, of the blocks that share a scale of W and a group's of x
//   acc                   float, in L1 from the first such blocks to the last, which write y
//
// Multiplications take vpdpbusd's place, additions do not; and scales of x in a group are powers of
// two apart. So a block's dots start from 1.5·2^(23 − e) as an int32, whose lowest bit is worth
// 2^−e as a float. Read as floats and with the start taken away, they are dot · 2^−e, exactly,
// since |dot| < 2^22.
#pragma once

#include "kernels/avx512_vnni/registers.h"

namespace edgelora::kernels::avx512_vnni {
namespace {

struct PanelPairs : VnniIsa<Registers> {
  using V = Registers;
  static constexpr int kPairRows = 6;

  // starts = magic + zero_term
  static void pack_pairs(const Activations& x, int64_t first_row, int32_t zero, RowTile* tile,
                         void* scratch, const ScratchLayout& layout) {
    const int64_t groups = ceil_div(tile->blocks, kGroupBlocks);
    auto* group_scales = reinterpret_cast<float*>(at(scratch, layout.group_scales));
    auto* magics = reinterpret_cast<__m128i*>(at(scratch, layout.magics));
    auto* terms = reinterpret_cast<__m128i*>(at(scratch, layout.magic_terms));
    for (int64_t m = 0; m < tile->rows; ++m) {
      const int64_t row = (first_row + m) * tile->blocks;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t b = g * kGroupBlocks, to = g * tile->rows + m;
        const __m128i there = first_lanes(tile->blocks - b);
        const __m128i scale = _mm_castps_si128(_mm_maskload_ps(x.scales + row + b, there));
        const __m128i sum = _mm_maskload_epi32(x.sums + row + b, there);
        const __m128i most = largest_lane(scale);  // NaN above all
        const __m128i none = _mm_cmpeq_epi32(scale, _mm_setzero_si128());
        const __m128i exponent = _mm_andnot_si128(none, _mm_sub_epi32(scale, most));
        const __m128i magic = _mm_add_epi32(_mm_set1_epi32(kMagicBits), exponent);
        _mm_store_ss(group_scales + to, _mm_castsi128_ps(most));
        _mm_store_si128(magics + to, magic);
        _mm_store_si128(terms + to, _mm_add_epi32(magic, zero_terms(zero, sum)));
      }
    }
    tile->group_scales = group_scales;
    tile->magics = reinterpret_cast<const float*>(magics);
    tile->magic_terms = reinterpret_cast<const int32_t*>(terms);
  }

  // out[p] [kRows, 16] = panel p · x
  template <Format kFormat, int kRows, int kPanels>
  static void panel_pair(const PanelView panels[], const RowTile& x, const Out out[],
                         const Ahead& ahead) {
    const int64_t step = int64_t{1} << panels[0].shift, blocks = panels[0].blocks;
    alignas(64) float acc[kPanels][kRows * kPanelRows];
    Out sums[kPanels];
    for (int p = 0; p < kPanels; ++p) sums[p] = {acc[p], kPanelRows};
    if (blocks <= step) {
      return add_blocks<kFormat, kRows, kPanels, true>(panels, x, {0, blocks}, sums, out, ahead);
    }
    add_blocks<kFormat, kRows, kPanels, true>(panels, x, {0, step}, sums, sums, ahead);
    int64_t first = step;
    for (; first + step < blocks; first += step) {
      add_blocks<kFormat, kRows, kPanels, false>(panels, x, {first, first + step}, sums, sums,
                                                 ahead);
    }
    add_blocks<kFormat, kRows, kPanels, false>(panels, x, {first, blocks}, sums, out, ahead);
  }

 private:
  static constexpr int32_t kMagicBits = 0x4b400000;  // of 1.5·2^23

  static __m128i first_lanes(int64_t count) {
    return _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int32_t>(count)),
                           _mm_setr_epi32(0, 1, 2, 3));
  }

  static __m128i zero_terms(int32_t zero, __m128i sums) {
    const __m128i products = _mm_mullo_epi32(sums, _mm_set1_epi32(zero));
    return _mm_srai_epi32(_mm_add_epi32(products, _mm_set1_epi32(16)), 5);
  }

  // Where magics and magic_terms of a block lie.
  template <int kRows>
  static int64_t lane(int64_t b, int64_t row) {
    return (b / kGroupBlocks * kRows + row) * kGroupBlocks + b % kGroupBlocks;
  }

  struct Blocks {  // that share a scale
    int64_t begin, end;
  };

  // to = from + blocks · x; without `from` where they are the first.
  template <Format kFormat, int kRows, int kPanels, bool kFirst>
  static void add_blocks(const PanelView panels[], const RowTile& x, const Blocks& blocks,
                         const Out from[], const Out to[], const Ahead& ahead) {
    Floats scales[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      scales[p] = V::scales<kFormat>(panels[p], blocks.begin, 0).scale;
    }
    Floats sums[kRows][kPanels];
    for (auto& row : sums) {
      for (Floats& sum : row) sum = V::zero_floats();
    }
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      ahead.prefetch(b);
      Ints dots[kRows][kPanels];
      block_dots<kFormat, kRows, kPanels>(panels, x, b, dots);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Floats magic = V::broadcast(x.magics[lane<kRows>(b, r)]);
        for (int p = 0; p < kPanels; ++p) {
          sums[r][p] = V::add(sums[r][p], V::sub(V::as_floats(dots[r][p]), magic));
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats x_scale = V::broadcast(x.group_scales[blocks.begin / kGroupBlocks * kRows + r]);
      for (int p = 0; p < kPanels; ++p) {
        const Floats sum = V::mul(sums[r][p], x_scale);
        Floats y = V::mul(sum, scales[p]);
        if (!kFirst) y = V::fmadd(sum, scales[p], V::load(from[p].to + r * from[p].stride));
        V::store(to[p].to + r * to[p].stride, y);
      }
    }
  }

  template <Format kFormat, int kRows, int kPanels>
  static void block_dots(const PanelView panels[], const RowTile& x, int64_t b,
                         Ints dots[kRows][kPanels]) {
    const int8_t* codes = x.codes + b * kRows * kActivationBlock;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) dots[r][p] = V::broadcast(x.magic_terms[lane<kRows>(b, r)]);
    }
#pragma GCC unroll 4
    for (int line = 0; line < 4; ++line) {
      Ints w[kPanels][2];
      for (int p = 0; p < kPanels; ++p) unpack_line<kFormat>(panels[p].codes, b, line, w[p]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Ints low = V::broadcast4(codes + r * kActivationBlock + 8 * line);
        const Ints high = V::broadcast4(codes + r * kActivationBlock + 8 * line + 4);
        for (int p = 0; p < kPanels; ++p) dots[r][p] = V::dot(dots[r][p], w[p][0], low);
        for (int p = 0; p < kPanels; ++p) dots[r][p] = V::dot(dots[r][p], w[p][1], high);
      }
    }
  }

  // Unsigned bytes of K 8·line … 8·line + 3, and of the four that follow.
  template <Format kFormat>
  static void unpack_line(const uint8_t* panel_codes, int64_t b, int line, Ints bytes[2]) {
    if constexpr (kFormat == Format::kInt8) {
      const uint8_t* codes = panel_codes + b * kBlockBytes + 128 * line;
      bytes[0] = V::flip(V::load(codes));
      bytes[1] = V::flip(V::load(codes + 64));
      return;
    }
    const Ints codes = V::load(panel_codes + b * kBlockBytes / 2 + 64 * line);
    bytes[0] = V::low_nibbles(codes);
    bytes[1] = V::high_nibbles(codes);
  }
};

}  // namespace
}  // namespace edgelora::kernels::avx512_vnni
