// Several rows of x where a scale of W holds for more than one block of x: two panels at a time. What is
// broadcast of x serves both, and 6 rows' dots and sums with 32 rows of W fill 24 of the 32 registers.
// A last panel alone is computed likewise: what y is must not depend on where a thread's panels end.
//   dots [rows][panels]   int32, of one block: as many chains of vpdpbusd
//   sums [rows][panels]   float, of the blocks that share a scale: one multiplication less for each
//   acc                   float, in L1 from the first such blocks to the last, which write y
#pragma once

#include "kernels/avx512_vnni/registers.h"

namespace edgelora::kernels::avx512_vnni {
namespace {

struct PanelPairs : VnniIsa<Registers> {
  using V = Registers;
  static constexpr int kPairRows = 6;

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
      if (has_codebook(kFormat)) scales[p] = V::mul(scales[p], V::broadcast(panels[p].unit));
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
        const Floats scale = V::broadcast(x.scales[b * kRows + r]);
        for (int p = 0; p < kPanels; ++p) {
          sums[r][p] = V::fmadd(V::to_float(dots[r][p]), scale, sums[r][p]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) {
        Floats y = V::mul(sums[r][p], scales[p]);
        if (!kFirst) y = V::fmadd(sums[r][p], scales[p], V::load(from[p].to + r * from[p].stride));
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
      for (int p = 0; p < kPanels; ++p) dots[r][p] = start<kFormat>(x, b * kRows + r);
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
    if constexpr (has_codebook(kFormat)) {
      for (int i = 0; i < 2; ++i) bytes[i] = V::template look_up<kFormat>(bytes[i]);
    }
  }
};

}  // namespace
}  // namespace edgelora::kernels::avx512_vnni
