// A panel times a tile's rows, for neon. Isa::dots gives the dots of one block, exact integers:
//
//   one row of x             one_row.h
//   ≤ Isa::kTileRows rows    codes unpacked in registers, acc in L1
//   more                     codes of a block unpacked once into L1, then kTileRows rows at a time
#pragma once

#include "kernels/neon/one_row.h"

namespace edgelora::kernels {
namespace {

// One block unpacked, in int8's order.
struct alignas(64) BlockBytes {
  int8_t of[kInt8BlockBytes];
};

template <Format kFormat>
void unpack_block(const uint8_t* block, const Scales& scales, BlockBytes* out) {
  for (int g = 0; g < 4; ++g) {
    for (int q = 0; q < 4; ++q) {
      const Codes w = load_bytes_of<kFormat>(block, scales, q, g);
      vst1q_s8(out->of + 128 * q + 16 * g, w.low);
      vst1q_s8(out->of + 128 * q + 16 * g + 64, w.high);
    }
  }
}

// Rows m … m + kRows − 1 of the tile.
template <class Isa, Format kFormat, Format kSource, int kRows>
EDGELORA_INLINE void some_rows(const uint8_t* block, const Scales& scales, const RowTile& x,
                               int64_t b, int64_t m, float* acc) {
  const int64_t i = b * x.rows + m;
  float32x4_t dots[kRows][4];
  Isa::template dots<kFormat, kSource, kRows>(block, scales, x, i, dots);
  XScale x_scales[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) x_scales[r] = x_scale<kFormat>(x, i + r);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float* out = acc + (m + r) * kPanelRows;
    float32x4_t sums[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) sums[g] = vld1q_f32(out + 4 * g);
    add_block<kFormat>(dots[r], scales, x_scales[r], sums);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) vst1q_f32(out + 4 * g, sums[g]);
  }
}

template <class Isa, Format kFormat, Format kSource>
void all_rows(const uint8_t* block, const Scales& scales, const RowTile& x, int64_t b, float* acc) {
  int64_t m = 0;
  for (; m + Isa::kTileRows <= x.rows; m += Isa::kTileRows) {
    some_rows<Isa, kFormat, kSource, Isa::kTileRows>(block, scales, x, b, m, acc);
  }
  if (m < x.rows) some_rows<Isa, kFormat, kSource, 1>(block, scales, x, b, m, acc);
}

template <class Isa, Format kFormat>
void many_rows(const PanelView& panel, const RowTile& x, float* acc) {
  for (int64_t i = 0; i < x.rows * kPanelRows; ++i) acc[i] = 0.0f;
  BlockBytes bytes;
  for (int64_t b = 0; b < panel.blocks; ++b) {
    const Scales scales = load_scales<kFormat>(panel, b);
    const uint8_t* block = block_codes<kFormat>(panel.codes, b);
    if (kFormat == Format::kInt8 || x.rows <= Isa::kTileRows) {
      all_rows<Isa, kFormat, kFormat>(block, scales, x, b, acc);
    } else {
      unpack_block<kFormat>(block, scales, &bytes);
      all_rows<Isa, kFormat, Format::kInt8>(reinterpret_cast<const uint8_t*>(bytes.of), scales, x,
                                            b, acc);
    }
  }
}

template <class Isa, Format kFormat>
void panel_of_rows(const PanelView& panel, const RowTile& x, float* acc) {
  if (x.rows == 1) {
    one_row<Isa, kFormat>(panel, x, acc);
  } else {
    many_rows<Isa, kFormat>(panel, x, acc);
  }
}

}  // namespace
}  // namespace edgelora::kernels
