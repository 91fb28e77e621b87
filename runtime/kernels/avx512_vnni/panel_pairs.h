// Several rows of x where a scale of W holds for more than one block of x, int4: two panels at a
// time. What is broadcast of x serves both, what is unpacked of W serves 8 rows, whose sums
// with 32 rows of W fill 16 of the 32 registers. A last panel alone is computed likewise: what y is
// must not depend on where a thread's panels end.
//   sums [rows][panels]   magic_steps.h, of the blocks that share a scale of W and a group's of x:
//                         as many chains of vpdpbusd
//   acc  [rows][panels]   float, in L1, of the blocks before
//
// On Intel's CPUs every vector instruction takes vpdpbusd's place, and where two threads share a
// core every instruction does: hence one addition a block, and places that only move on.
#pragma once

#include "kernels/avx512_vnni/magic_steps.h"
#include "kernels/avx512_vnni/registers.h"

namespace edgelora::kernels::avx512_vnni {
namespace {

struct PanelPairs : VnniIsa<Registers> {
  using V = Registers;
  static constexpr int kPairRows = 8;

  static void pack_pairs(const Weights& weights, const Activations& x, int64_t first_row,
                         RowTile* tile, void* scratch, const ScratchLayout& layout) {
    pack_magic_steps(x, weights.block_size, first_row, tile, scratch, layout);
  }

  // out[p] [kRows, 16] = panel p · x
  template <int kRows, int kPanels>
  static void panel_pair(const PanelView panels[], const RowTile& x, const Out out[],
                         const Ahead& ahead) {
    const int64_t step = int64_t{1} << panels[0].shift, blocks = panels[0].blocks;
    alignas(64) float acc[kRows * kPanels * kPanelRows] = {};
    Place<kPanels> place = first_place<kPanels>(panels, x, ahead);
    for (int64_t first = 0;; first += step) {
      const int64_t end = min_of(first + step, blocks);
      Floats sums[kRows][kPanels];
      start<kRows, kPanels>(place, sums);
      add_dots<kRows, kPanels>(place, ahead.lines, sums);
      for (int64_t b = first + 1; b < end; ++b) {
        go_on<kRows, kPanels>(place, sums);
        add_dots<kRows, kPanels>(place, ahead.lines, sums);
      }
      const float* magics = place.magics + (end - 1) % kGroupBlocks;
      if (end == blocks) {
        Out to[kPanels];
        for (int p = 0; p < kPanels; ++p) to[p] = out[p];
        return scale<kRows, kPanels>(place, magics, sums, acc, [&](int p, float*, Floats y) {
          V::store(to[p].to, y);
          to[p].to += to[p].stride;
        });
      }
      scale<kRows, kPanels>(place, magics, sums, acc,
                            [](int, float* of, Floats y) { V::store(of, y); });
      next_scale<kRows, kPanels>(x, end, &place);
    }
  }

 private:
  template <int kPanels>
  struct Place {  // of what is read next
    const uint8_t* w[kPanels];
    const uint16_t* scales[kPanels];
    const int8_t* codes;
    const float* steps;         // of the first row; kGroupBlocks further that of the next
    const float* magics;        // of the group's first block, likewise
    const float* group_scales;  // of the group's rows
    const char* ahead;
  };

  template <int kPanels>
  static Place<kPanels> first_place(const PanelView panels[], const RowTile& x,
                                    const Ahead& ahead) {
    Place<kPanels> place{{}, {}, x.codes, x.magic_steps, x.magics, x.group_scales, ahead.from};
    for (int p = 0; p < kPanels; ++p) {
      place.w[p] = panels[p].codes;
      place.scales[p] = panels[p].scales;
    }
    return place;
  }

  template <int kRows, int kPanels>
  static void next_scale(const RowTile& x, int64_t block, Place<kPanels>* place) {
    for (const uint16_t*& scales : place->scales) scales += kPanelRows;
    if (block % kGroupBlocks != 0) return;
    place->group_scales += kRows;
    place->magics += kGroupBlocks * kRows;
    place->steps = x.magic_steps + (place->magics - x.magics);
  }

  template <int kRows, int kPanels>
  static void start(const Place<kPanels>& place, Floats sums[kRows][kPanels]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) sums[r][p] = V::broadcast(place.steps[kGroupBlocks * r]);
    }
  }

  template <int kRows, int kPanels>
  static void go_on(const Place<kPanels>& place, Floats sums[kRows][kPanels]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats step = V::broadcast(place.steps[kGroupBlocks * r]);
      for (int p = 0; p < kPanels; ++p) sums[r][p] = V::add(sums[r][p], step);
    }
  }

  // One block. As a call, as those below, it would hand the sums over in memory.
  template <int kRows, int kPanels>
  __attribute__((always_inline)) static void add_dots(Place<kPanels>& place, int64_t lines,
                                                      Floats sums[kRows][kPanels]) {
    for (int64_t i = 0; i < lines; ++i) _mm_prefetch(place.ahead + i * 64, _MM_HINT_T0);
    place.ahead += lines * 64;
#pragma GCC unroll 4
    for (int line = 0; line < 4; ++line) {
      Ints w[kPanels];
      for (int p = 0; p < kPanels; ++p) w[p] = V::load(place.w[p] + 64 * line);
      const int8_t* codes = place.codes + 8 * line;
      add_quad<kRows, kPanels>(w, V::low_nibbles, codes, sums);
      add_quad<kRows, kPanels>(w, V::high_nibbles, codes + 4, sums);
    }
    for (const uint8_t*& w : place.w) w += kBlockBytes / 2;
    place.codes += kRows * kActivationBlock;
    ++place.steps;
  }

  // Four columns of W, nibbles(w), and of each row of x.
  template <int kRows, int kPanels, class Nibbles>
  __attribute__((always_inline)) static void add_quad(const Ints w[kPanels], Nibbles nibbles,
                                                      const int8_t* codes,
                                                      Floats sums[kRows][kPanels]) {
    Ints columns[kPanels];
    for (int p = 0; p < kPanels; ++p) columns[p] = nibbles(w[p]);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Ints quad = V::broadcast4(codes + r * kActivationBlock);
      for (int p = 0; p < kPanels; ++p) {
        sums[r][p] = V::as_floats(V::dot(V::as_ints(sums[r][p]), columns[p], quad));
      }
    }
  }

  // put(panel, its acc, acc + the sums times their scales) of each row in turn.
  template <int kRows, int kPanels, class Put>
  __attribute__((always_inline)) static void scale(const Place<kPanels>& place,
                                                   const float* magics,
                                                   const Floats sums[kRows][kPanels], float* acc,
                                                   Put put) {
    Floats scales[kPanels];
    for (int p = 0; p < kPanels; ++p) scales[p] = V::load_halves(place.scales[p]);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats magic = V::broadcast(magics[kGroupBlocks * r]);
      const Floats x_scale = V::broadcast(place.group_scales[r]);
      for (int p = 0; p < kPanels; ++p) {
        float* of = acc + (r * kPanels + p) * kPanelRows;
        const Floats sum = V::mul(V::sub(sums[r][p], magic), x_scale);
        put(p, of, V::fmadd(sum, scales[p], V::load(of)));
      }
    }
  }
};

}  // namespace
}  // namespace edgelora::kernels::avx512_vnni
