// Several rows of x and two panels of W at a time. What is broadcast of x serves both panels, what
// is unpacked of W all rows. A last panel alone is computed likewise: what y is must not depend on
// where a thread's panels end.
//   sums [rows][panels]   int32, as many chains of vpdpbusd: of int4 the blocks that share a scale
//                         of W and a group's of x (magic_steps.h), else one block
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

  // 0: formats whose panels go alone. Of int4 12 rows were slower than 8, whose sums and what else
  // is at hand fit in registers (Ice Lake: 230 and 239 GMAC/s).
  static constexpr int pair_rows(Format format) {
    return has_extras(format) ? 0 : format == Format::kInt4 ? 8 : 12;
  }

  static void pack_pairs(const Weights& weights, const Activations& x, int64_t first_row,
                         RowTile* tile, void* scratch, const ScratchLayout& layout) {
    pack_magic_steps(x, weights.block_size, first_row, tile, scratch, layout);
  }

  // out[p] [kRows, 16] = panel p · x
  template <Format kFormat, int kRows, int kPanels>
  static void panel_pair(const PanelView panels[], const RowTile& x, const Out out[],
                         const Ahead& ahead) {
    if constexpr (kFormat == Format::kInt4) {
      grouped_pair<kRows, kPanels>(panels, x, out, ahead);
    } else {
      block_pair<kFormat, kRows, kPanels>(panels, x, out, ahead);
    }
  }

 private:
  template <int kPanels>
  struct Place {  // of what is read next
    Place(const PanelView panels[], const RowTile& x, const Ahead& from)
        : codes(x.codes), ahead(from.from), lines(from.lines) {
      for (int p = 0; p < kPanels; ++p) {
        w[p] = panels[p].codes;
        scales[p] = panels[p].scales;
      }
    }
    void next_scale() {
      for (const uint16_t*& of : scales) of += kPanelRows;
    }
    const uint8_t* w[kPanels];
    const uint16_t* scales[kPanels];
    const int8_t* codes;
    const char* ahead;
    int64_t lines;
  };

  // Of the first row of x in a group; kGroupBlocks further steps and magics of the next.
  struct GroupPlace {
    const float* steps;
    const float* magics;
    const float* scales;
  };

  // int4, blocks of x in groups.
  template <int kRows, int kPanels>
  static void grouped_pair(const PanelView panels[], const RowTile& x, const Out out[],
                           const Ahead& ahead) {
    const int64_t step = int64_t{1} << panels[0].shift, blocks = panels[0].blocks;
    alignas(64) float acc[kRows * kPanels * kPanelRows] = {};
    Place<kPanels> place(panels, x, ahead);
    GroupPlace group{x.magic_steps, x.magics, x.group_scales};
    for (int64_t first = 0;; first += step) {
      const int64_t end = min_of(first + step, blocks), before = first % kGroupBlocks;
      Ints sums[kRows][kPanels];
      start<kRows, kPanels>(group.steps + before, kGroupBlocks, sums);
      add_dots<Format::kInt4, kRows, kPanels>(&place, sums);
      for (int64_t b = 1; b < end - first; ++b) {
        go_on<kRows, kPanels>(group.steps + before + b, sums);
        add_dots<Format::kInt4, kRows, kPanels>(&place, sums);
      }
      const float* magics = group.magics + (end - 1) % kGroupBlocks;
      const auto row = [&](int r) {
        const Floats magic = V::broadcast(magics[kGroupBlocks * r]);
        return [magic](Ints sum) { return V::sub(V::as_floats(sum), magic); };
      };
      if (end == blocks) {
        const Floats unit = V::broadcast(1.0f);
        return finish<kRows, kPanels>(place, sums, row, group.scales, unit, acc, out);
      }
      add_scaled<kRows, kPanels>(place, sums, row, group.scales, acc);
      place.next_scale();
      if (end % kGroupBlocks == 0) next_group<kRows>(&group);
    }
  }

  template <int kRows>
  static void next_group(GroupPlace* group) {
    group->steps += kGroupBlocks * kRows;
    group->magics += kGroupBlocks * kRows;
    group->scales += kRows;
  }

  // The others, each block of x with a scale of its own.
  template <Format kFormat, int kRows, int kPanels>
  static void block_pair(const PanelView panels[], const RowTile& x, const Out out[],
                         const Ahead& ahead) {
    const int64_t blocks = panels[0].blocks, last_of_scale = (1 << panels[0].shift) - 1;
    alignas(64) float acc[kRows * kPanels * kPanelRows] = {};
    Place<kPanels> place(panels, x, ahead);
    const int32_t* terms = x.terms;
    const float* scales = x.scales;
    for (int64_t b = 0;; ++b) {
      Ints sums[kRows][kPanels];
      start<kRows, kPanels>(terms, 1, sums);
      add_dots<kFormat, kRows, kPanels>(&place, sums);
      const auto row = [](int) { return V::to_float; };
      if (b + 1 == blocks) {
        const Floats unit = V::broadcast(panels[0].unit);
        return finish<kRows, kPanels>(place, sums, row, scales, unit, acc, out);
      }
      add_scaled<kRows, kPanels>(place, sums, row, scales, acc);
      if ((b & last_of_scale) == last_of_scale) place.next_scale();
      terms += kRows;
      scales += kRows;
    }
  }

  static Ints bits_of(const float* from) { return V::as_ints(V::broadcast(*from)); }
  static Ints bits_of(const int32_t* from) { return V::broadcast(*from); }

  // from: of the first row, `stride` further of the next.
  template <int kRows, int kPanels, class T>
  static void start(const T* from, int64_t stride, Ints sums[kRows][kPanels]) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) sums[r][p] = bits_of(from + stride * r);
    }
  }

  template <int kRows, int kPanels>
  static void go_on(const float* steps, Ints sums[kRows][kPanels]) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Floats step = V::broadcast(steps[kGroupBlocks * r]);
      for (int p = 0; p < kPanels; ++p) {
        sums[r][p] = V::as_ints(V::add(V::as_floats(sums[r][p]), step));
      }
    }
  }

  // One block. As a call, as those below, it would hand the sums over in memory.
  template <Format kFormat, int kRows, int kPanels>
  EDGELORA_INLINE static void add_dots(Place<kPanels>* place, Ints sums[kRows][kPanels]) {
    for (int64_t i = 0; i < place->lines; ++i) _mm_prefetch(place->ahead + i * 64, _MM_HINT_T0);
    place->ahead += place->lines * 64;
#pragma GCC unroll 4
    for (int line = 0; line < 4; ++line) {
      const int8_t* codes = place->codes + 8 * line;
      Ints w[kPanels];
      if constexpr (kFormat == Format::kInt8) {
        for (int p = 0; p < kPanels; ++p) w[p] = V::load(place->w[p] + 128 * line);
        add_quad<kFormat, kRows, kPanels>(w, V::flip, codes, sums);
        for (int p = 0; p < kPanels; ++p) w[p] = V::load(place->w[p] + 128 * line + 64);
        add_quad<kFormat, kRows, kPanels>(w, V::flip, codes + 4, sums);
      } else {
        for (int p = 0; p < kPanels; ++p) w[p] = V::load(place->w[p] + 64 * line);
        add_quad<kFormat, kRows, kPanels>(w, V::low_nibbles, codes, sums);
        add_quad<kFormat, kRows, kPanels>(w, V::high_nibbles, codes + 4, sums);
      }
    }
    constexpr int64_t kBytes = kFormat == Format::kInt8 ? kBlockBytes : kBlockBytes / 2;
    for (const uint8_t*& w : place->w) w += kBytes;
    place->codes += kRows * kActivationBlock;
  }

  // Four columns of W, nibbles(w), and of each row of x.
  template <Format kFormat, int kRows, int kPanels, class Nibbles>
  EDGELORA_INLINE static void add_quad(const Ints w[kPanels], Nibbles nibbles, const int8_t* codes,
                                       Ints sums[kRows][kPanels]) {
    Ints columns[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      columns[p] = nibbles(w[p]);
      if constexpr (has_codebook(kFormat)) columns[p] = V::template look_up<kFormat>(columns[p]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Ints quad = V::broadcast4(codes + r * kActivationBlock);
      for (int p = 0; p < kPanels; ++p) sums[r][p] = V::dot(sums[r][p], columns[p], quad);
    }
  }

  // put(panel, its acc, acc + the sums times their scales) of each row in turn; row(r): a sum of
  // that row → float; x_scales: of the rows. Rounded as few_rows rounds where a block is scaled by
  // itself: how many rows there are changes no bit of y then.
  template <int kRows, int kPanels, class Row, class Put>
  EDGELORA_INLINE static void scale(const Place<kPanels>& place, const Ints sums[kRows][kPanels],
                                    Row row, const float* x_scales, float* acc, Put put) {
    Floats scales[kPanels];
    for (int p = 0; p < kPanels; ++p) scales[p] = V::load_halves(place.scales[p]);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const auto value = row(r);
      const Floats x_scale = V::broadcast(x_scales[r]);
      for (int p = 0; p < kPanels; ++p) {
        float* of = acc + (r * kPanels + p) * kPanelRows;
        put(p, of, V::fmadd(value(sums[r][p]), V::mul(scales[p], x_scale), V::load(of)));
      }
    }
  }

  template <int kRows, int kPanels, class Row>
  EDGELORA_INLINE static void add_scaled(const Place<kPanels>& place,
                                         const Ints sums[kRows][kPanels], Row row,
                                         const float* x_scales, float* acc) {
    scale<kRows, kPanels>(place, sums, row, x_scales, acc,
                          [](int, float* of, Floats y) { V::store(of, y); });
  }

  template <int kRows, int kPanels, class Row>
  EDGELORA_INLINE static void finish(const Place<kPanels>& place, const Ints sums[kRows][kPanels],
                                     Row row, const float* x_scales, Floats unit, float* acc,
                                     const Out out[]) {
    Out to[kPanels];
    for (int p = 0; p < kPanels; ++p) to[p] = out[p];
    scale<kRows, kPanels>(place, sums, row, x_scales, acc, [&](int p, float*, Floats y) {
      V::store(to[p].to, V::mul(y, unit));
      to[p].to += to[p].stride;
    });
  }
};

}  // namespace
}  // namespace edgelora::kernels::avx512_vnni
