// Several rows of x where a scale of W holds for more than one block of x: two panels at a time. What is
// broadcast of x serves both, and 6 rows' dots and sums with 32 rows of W fill 24 of the 32 registers.
// A last panel alone is computed likewise: what y is must not depend on where a thread's panels end.
//   dots [rows][panels]   int32, of one block: as many chains of vpdpbusd
//   sums [rows][panels]   float, of the blocks that share a scale: one multiplication less for each
//   acc                   float, in L1
#pragma once

#include "kernels/avx512_vnni/registers.h"

namespace edgelora::kernels::avx512_vnni {
namespace {

struct PanelPairs : VnniIsa<Registers> {
  using V = Registers;
  static constexpr int kPairRows = 6;

  // acc[p] [kRows, 16] = panel p · x
  template <Format kFormat, int kRows, int kPanels>
  static void panel_pair(const PanelView panels[], const RowTile& x, float* acc[]) {
    const int64_t step = int64_t{1} << panels[0].shift;
    for (int p = 0; p < kPanels; ++p) std::memset(acc[p], 0, kRows * kPanelRows * sizeof(float));
    for (int64_t first = 0; first < panels[0].blocks; first += step) {
      add_blocks<kFormat, kRows, kPanels>(panels, x, first, min_of(first + step, panels[0].blocks), acc);
    }
  }

 private:
  // The blocks that share a scale.
  template <Format kFormat, int kRows, int kPanels>
  static void add_blocks(const PanelView panels[], const RowTile& x, int64_t first, int64_t end,
                         float* acc[]) {
    V::Scales scales[kPanels];
    for (int p = 0; p < kPanels; ++p) scales[p] = V::scales<kFormat>(panels[p], first, 0);
    Floats sums[kRows][kPanels];
    for (auto& row : sums) {
      for (Floats& sum : row) sum = V::zero_floats();
    }
    for (int64_t b = first; b < end; ++b) {
      for (int p = 0; p < kPanels; ++p) prefetch_block<kFormat>(panels[p].codes, b, kPrefetchBytes);
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
        float* out = acc[p] + r * kPanelRows;
        V::store(out, V::fmadd(sums[r][p], scales[p].scale, V::load(out)));
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
