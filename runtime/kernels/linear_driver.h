// What `linear` does around one ISA's inner loop: rows in tiles, panels in turn, the last panel's
// missing rows.
//
//   for each tile of up to kRowTile rows      activations rearranged once, block by block
//     for each panel
//       Isa::panel of the format              acc [rows, 16]
//       acc → y
//
// One row needs no rearranging: [Kp / 32, 1, 32] is how it lies already.
#pragma once

#include <cassert>
#include <type_traits>

#include "kernels/codebooks.h"
#include "kernels/scratch.h"

namespace edgelora::kernels {
namespace {

// A tile of rows of x. In blocks of 32 of K, so that a block of all rows is contiguous: rows that
// are a power of two apart would share a few cache sets.
struct RowTile {
  int64_t rows;
  int64_t blocks;             // Kp / 32
  const int8_t* codes;        // [blocks, rows, 32]
  const float* scales;        // [blocks, rows]
  const int32_t* terms;       // [blocks, rows], zero_term; null if the ISA wants none
  const float* shifts;        // [blocks, rows], scale · Σ codes; kInt4Offsets only
  const int16_t* starts;      // [blocks, rows, 2, 2], and
  const uint8_t* wide;        // [blocks], of avx2's nf4 and fp4
  const float* group_scales;  // [groups of blocks, rows], and
  const float* magics;        // [groups, rows, 4], and
  const float* magic_steps;   // [groups, rows, 4], of magic_steps.h
};

// One panel of W.
struct PanelView {
  const uint8_t* codes;
  const uint16_t* scales;      // float16 [scale blocks, 16]
  const uint8_t* zero_points;  // [scale blocks, 8]; kInt4ZeroPoints only
  const uint16_t* offsets;     // float16 [scale blocks, 16]; kInt4Offsets only
  int64_t blocks;              // Kp / 32
  int shift;                   // block of 32 b has scale block b >> shift
  float unit;                  // of scales made of absmax, else 1
};

inline char* at(void* scratch, int64_t offset) { return static_cast<char*>(scratch) + offset; }

inline void pack_codes(const Activations& x, int64_t first_row, int64_t blocks, RowTile* tile,
                       void* scratch, const ScratchLayout& layout) {
  auto* codes = reinterpret_cast<int8_t*>(at(scratch, layout.codes));
  for (int64_t m = 0; m < tile->rows; ++m) {
    const int8_t* from = x.codes + (first_row + m) * blocks * kActivationBlock;
    for (int64_t b = 0; b < blocks; ++b) {
      std::memcpy(codes + (b * tile->rows + m) * kActivationBlock, from + b * kActivationBlock,
                  kActivationBlock);
    }
  }
  tile->codes = codes;
}

inline void pack_scales(const Activations& x, int64_t first_row, RowTile* tile, void* scratch,
                        const ScratchLayout& layout) {
  auto* scales = reinterpret_cast<float*>(at(scratch, layout.scales));
  for (int64_t m = 0; m < tile->rows; ++m) {
    const float* from = x.scales + (first_row + m) * tile->blocks;
    for (int64_t b = 0; b < tile->blocks; ++b) scales[b * tile->rows + m] = from[b];
  }
  tile->scales = scales;
}

// zero · Σ codes of a block, a row's sum; zero in 32nds, to the nearest integer.
inline int32_t zero_term(int32_t zero, int32_t sum) { return (zero * sum + 16) >> 5; }

inline void pack_terms(const Activations& x, int64_t first_row, int32_t zero, RowTile* tile,
                       void* scratch, const ScratchLayout& layout) {
  auto* terms = reinterpret_cast<int32_t*>(at(scratch, layout.terms));
  const int64_t rows = tile->rows;
  for (int64_t m = 0; m < rows; ++m) {
    const int32_t* sums = x.sums + (first_row + m) * tile->blocks;
    if (rows == 1) {  // of which registers hold many
      for (int64_t b = 0; b < tile->blocks; ++b) terms[b] = zero_term(zero, sums[b]);
    } else {
      for (int64_t b = 0; b < tile->blocks; ++b) terms[b * rows + m] = zero_term(zero, sums[b]);
    }
  }
  tile->terms = terms;
}

inline void pack_shifts(const Activations& x, int64_t first_row, RowTile* tile, void* scratch,
                        const ScratchLayout& layout) {
  auto* shifts = reinterpret_cast<float*>(at(scratch, layout.terms));
  for (int64_t m = 0; m < tile->rows; ++m) {
    const int64_t row = (first_row + m) * tile->blocks;
    for (int64_t b = 0; b < tile->blocks; ++b) {
      shifts[b * tile->rows + m] = x.scales[row + b] * static_cast<float>(x.sums[row + b]);
    }
  }
  tile->shifts = shifts;
}

// What pack(tile) makes of the rows, or made of them in the call before.
template <class Tile, class Pack>
const Tile& packed_tile(const Weights& weights, const Activations& x, void* scratch, Pack pack) {
  static_assert(sizeof(Tile) <= kTileNotes);
  auto* tile = reinterpret_cast<Tile*>(at(scratch, scratch_layout(weights).tile));
  if (!x.kept || x.rows > kRowTile) pack(tile);  // a later tile took the first one's place
  return *tile;
}

// zero: what the ISA multiplies Σ codes by, in 32nds.
inline RowTile pack_rows(const Weights& weights, const Activations& x, int64_t first_row,
                         int32_t zero, void* scratch) {
  const ScratchLayout layout = scratch_layout(weights);
  const int64_t blocks = activation_blocks(weights.in_features);
  RowTile tile{};
  tile.rows = min_of(kRowTile, x.rows - first_row);
  tile.blocks = blocks;
  if (tile.rows == 1) {
    tile.codes = x.codes + first_row * blocks * kActivationBlock;
    tile.scales = x.scales + first_row * blocks;
  } else {
    pack_codes(x, first_row, blocks, &tile, scratch, layout);
    pack_scales(x, first_row, &tile, scratch, layout);
  }
  if (weights.format == Format::kInt4Offsets) {
    pack_shifts(x, first_row, &tile, scratch, layout);
  } else if (zero != 0 || has_codebook(weights.format)) {
    pack_terms(x, first_row, zero, &tile, scratch, layout);
  }
  return tile;
}

inline PanelView panel_view(const Weights& weights, int64_t panel) {
  const int64_t first = first_scale_block(weights, panel);
  PanelView view{};
  view.codes = panel_codes(weights, panel);
  view.blocks = activation_blocks(weights.in_features);
  const int64_t size = scale_block_size(weights);
  view.shift = size == 32 ? 0 : size == 64 ? 1 : 2;
  view.scales = weights.scales + first * kPanelRows;
  view.unit = has_codebook(weights.format) ? weights.scale_unit : 1.0f;
  if (weights.format == Format::kInt4ZeroPoints) {
    view.zero_points = static_cast<const uint8_t*>(weights.zero_points) + first * 8;
  } else if (weights.format == Format::kInt4Offsets) {
    view.offsets = static_cast<const uint16_t*>(weights.zero_points) + first * kPanelRows;
  }
  return view;
}

// Scales made of absmax are multiples of a unit.
inline void scale_tile(float unit, int64_t rows, float* acc) {
  if (unit == 1.0f) return;
  for (int64_t i = 0; i < rows * kPanelRows; ++i) acc[i] *= unit;
}

inline void store_tile(const float* acc, int64_t rows, int64_t columns, float* y,
                       int64_t y_stride) {
  for (int64_t m = 0; m < rows; ++m) {
    const float* from = acc + m * kPanelRows;
    float* to = y + m * y_stride;
    if (columns == kPanelRows) {
      std::memcpy(to, from, kPanelRows * sizeof(float));
    } else {
      for (int64_t i = 0; i < columns; ++i) to[i] = from[i];
    }
  }
}

// body(std::integral_constant<Format, format>): of the formats that have an integer path.
template <class Body>
void with_format(Format format, const Body& body) {
  switch (format) {
    case Format::kInt4:
      return body(std::integral_constant<Format, Format::kInt4>());
    case Format::kInt4ZeroPoints:
      return body(std::integral_constant<Format, Format::kInt4ZeroPoints>());
    case Format::kInt4Offsets:
      return body(std::integral_constant<Format, Format::kInt4Offsets>());
    case Format::kInt8:
      return body(std::integral_constant<Format, Format::kInt8>());
    case Format::kNf4:
      return body(std::integral_constant<Format, Format::kNf4>());
    case Format::kFp4:
      return body(std::integral_constant<Format, Format::kFp4>());
    case Format::kFloat:
      return;
  }
}

// y: of the tile's first row.
template <class Isa, class Tile>
void run_panels(const Weights& weights, const Tile& x, int64_t panel_begin, int64_t panel_end,
                float* y, int64_t y_stride) {
  alignas(64) float acc[kRowTile * kPanelRows];
  with_format(weights.format, [&](auto format) {
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      const PanelView view = panel_view(weights, p);
      Isa::template panel<decltype(format)::value>(view, x, acc);
      scale_tile(view.unit, x.rows, acc);
      store_tile(acc, x.rows, panel_rows(weights, p), y + p * kPanelRows, y_stride);
    }
  });
}

template <class Isa>
void drive_linear(const Weights& weights, const Activations& x, int64_t panel_begin,
                  int64_t panel_end, float* y, int64_t y_stride, void* scratch) {
  assert(weights.format != Format::kFloat);
  const int32_t zero = Isa::term_zero(weights.format);
  for (int64_t m = 0; m < x.rows; m += kRowTile) {
    const auto pack = [&](RowTile* tile) { *tile = pack_rows(weights, x, m, zero, scratch); };
    run_panels<Isa>(weights, packed_tile<RowTile>(weights, x, scratch, pack), panel_begin,
                    panel_end, y + m * y_stride, y_stride);
  }
}

}  // namespace
}  // namespace edgelora::kernels
