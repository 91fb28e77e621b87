// `linear` of many rows on AMX tiles; few rows are avx512_vnni's.
//
//   A   16 rows of x × 32 K, bfloat16, scaled       converted once for up to kRows rows of x
//   B   32 K × 16 rows of W, bfloat16, scaled       two panels' chunk of K, dequantized into L1
//                                                   for all of them
//         row i: │ r0: K2i K2i+1 │ r1 … │ r15 │
//   C   16 rows of x × 16 rows of W, float          2 × 2 of them at a time
//
// Why not int8 tiles, which are twice as fast: their dots must leave the tile at each block of 32
// to be scaled, and that (tilestored and three instructions a row) takes longer than vpdpbusd does.
// bfloat16 rounds x and W to 8 bits each: less than half of what int8 blocks lose of x.
#include "kernels/amx_bf16/amx_bf16.h"
#include "kernels/amx_bf16/dequantize.h"
#include "kernels/avx512_vnni/avx512_vnni.h"

namespace edgelora::kernels::amx_bf16 {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kRows = kWideRows;      // of x, converted at a time; half as many where
constexpr int64_t kMostABytes = 1 << 20;  // they would fill the second cache
constexpr int64_t kFewRows = 16;          // avx512_vnni is as fast up to here
constexpr int64_t kPanels = 2;            // of W, multiplied at a time
constexpr int64_t kChunk = 8;             // blocks of K: 16 KB of B, beside as much of A
constexpr int64_t kRowBytes = 64;         // of 32 K, of a row of C
constexpr int64_t kTileBytes = kTileRows * kRowBytes;

struct TileShapes {  // ldtilecfg's palette 1
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

alignas(64) const TileShapes kShapes = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Rows of x as A: tile (b, g) at codes + (b · groups + g) · kTileBytes.
struct RowTiles {
  int64_t rows, groups;
  char* tiles;
};

int64_t rows_at_once(int64_t blocks) {
  return kRows * blocks * kRowBytes > kMostABytes ? kRows / 2 : kRows;
}

RowTiles convert_rows(const Activations& x, int64_t first, int64_t blocks, char* tiles) {
  const int64_t rows = min_of(rows_at_once(blocks), x.rows - first);
  const RowTiles out{rows, ceil_div(rows, kTileRows), tiles};
  if (x.kept && rows == x.rows) return out;
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = (first + m) * blocks;
    char* to = tiles + m * kRowBytes;
    for (int64_t b = 0; b < blocks; ++b) {
      convert_block(x.codes + (row + b) * kActivationBlock, x.scales[row + b],
                    to + b * out.groups * kTileBytes);
    }
  }
  return out;
}

// What a call multiplies at a time: kGroups · 16 rows of x, kPanels panels of W, a chunk of K.
struct Product {
  const char* a;
  int64_t a_step;  // bytes from a block of K to the next
  const char* b;
  int64_t b_panel;  // bytes from a panel to the next
  int64_t blocks;
  float* c;    // [groups][panels][16, 16]
  bool first;  // C starts at zero
};

// A of all rows lies in L2.
template <int kGroups>
void prefetch_tiles(const char* a) {
  for (int64_t i = 0; i < kGroups * kTileBytes; i += 64) _mm_prefetch(a + i, _MM_HINT_T0);
}

// The numbers of tiles cannot be expressions. C: 0 … 3 (group, panel), A: 4, 5, B: 6, 7.
template <int kGroups, int kOfPanels>
void multiply(const Product& p) {
  constexpr int64_t kTileFloats = kTileRows * kPanelRows;
  __asm__ volatile("" ::: "memory");  // GCC does not know that tileloadd reads memory
  if (p.first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, p.c, kRowBytes);
    if constexpr (kOfPanels == 2) _tile_loadd(1, p.c + kTileFloats, kRowBytes);
    if constexpr (kGroups == 2) _tile_loadd(2, p.c + 2 * kTileFloats, kRowBytes);
    if constexpr (kGroups * kOfPanels == 4) _tile_loadd(3, p.c + 3 * kTileFloats, kRowBytes);
  }
  for (int64_t b = 0; b < p.blocks; ++b) {
    prefetch_tiles<kGroups>(p.a + (b + 1) * p.a_step);
    _tile_loadd(4, p.a + b * p.a_step, kRowBytes);
    _tile_loadd(6, p.b + b * kTileBytes, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kOfPanels == 2) {
      _tile_loadd(7, p.b + p.b_panel + b * kTileBytes, kRowBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kGroups == 2) {
      _tile_loadd(5, p.a + b * p.a_step + kTileBytes, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kGroups * kOfPanels == 4) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, p.c, kRowBytes);
  if constexpr (kOfPanels == 2) _tile_stored(1, p.c + kTileFloats, kRowBytes);
  if constexpr (kGroups == 2) _tile_stored(2, p.c + 2 * kTileFloats, kRowBytes);
  if constexpr (kGroups * kOfPanels == 4) _tile_stored(3, p.c + 3 * kTileFloats, kRowBytes);
}

void multiply(const Product& p, int64_t groups, int64_t panels) {
  if (groups == 2) return panels == 2 ? multiply<2, 2>(p) : multiply<2, 1>(p);
  return panels == 2 ? multiply<1, 2>(p) : multiply<1, 1>(p);
}

struct Memory {
  alignas(64) char b[kPanels * kChunk * kTileBytes];
  alignas(64) float c[kRows / kTileRows][kPanels][kTileRows * kPanelRows];
};

// C of all rows and one or two panels.
template <Format kFormat>
void multiply_panels(const PanelView* views, int64_t panels, const RowTiles& x, Memory* memory) {
  const int64_t blocks = views[0].blocks, chunks = ceil_div(blocks, kChunk);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = blocks * chunk / chunks, count = blocks * (chunk + 1) / chunks - first;
    for (int64_t p = 0; p < panels; ++p) {
      dequantize_panel<kFormat>(views[p], first, count, memory->b + p * kChunk * kTileBytes);
    }
    for (int64_t g = 0; g < x.groups; g += 2) {
      const char* a = x.tiles + (first * x.groups + g) * kTileBytes;
      multiply({a, x.groups * kTileBytes, memory->b, kChunk * kTileBytes, count, memory->c[g][0],
                chunk == 0},
               min_of(2, x.groups - g), panels);
    }
  }
}

void scale_panels(float unit, int64_t rows, int64_t panels, Memory* memory) {
  for (int64_t m = 0; m < rows; m += kTileRows) {
    for (int64_t p = 0; p < panels; ++p) scale_tile(unit, kTileRows, memory->c[m / kTileRows][p]);
  }
}

// y of one panel: 16 floats of each row.
void store_panel(const Memory& memory, int64_t panel, int64_t rows, int64_t columns, float* y,
                 int64_t y_stride) {
  for (int64_t m = 0; m < rows; m += kTileRows) {
    store_tile(memory.c[m / kTileRows][panel], min_of(kTileRows, rows - m), columns,
               y + m * y_stride, y_stride);
  }
}

template <Format kFormat>
void multiply_rows(const Weights& weights, const RowTiles& x, int64_t panel_begin,
                   int64_t panel_end, float* y, int64_t y_stride) {
  Memory memory;
  for (int64_t p = panel_begin; p < panel_end; p += kPanels) {
    const int64_t panels = min_of(kPanels, panel_end - p);
    PanelView views[kPanels] = {};
    for (int64_t i = 0; i < panels; ++i) views[i] = panel_view(weights, p + i);
    multiply_panels<kFormat>(views, panels, x, &memory);
    scale_panels(views[0].unit, x.rows, panels, &memory);
    for (int64_t i = 0; i < panels; ++i) {
      store_panel(memory, i, x.rows, panel_rows(weights, p + i), y + (p + i) * kPanelRows,
                  y_stride);
    }
  }
}

}  // namespace

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch) {
  assert(weights.format != Format::kFloat);
  if (x.rows <= kFewRows) {
    return avx512_vnni::linear(weights, x, panel_begin, panel_end, y, y_stride, scratch);
  }
  const ScratchLayout layout = scratch_layout(weights);
  const int64_t blocks = activation_blocks(weights.in_features);
  _tile_loadconfig(&kShapes);
  for (int64_t m = 0; m < x.rows; m += rows_at_once(blocks)) {
    const RowTiles tiles = convert_rows(x, m, blocks, at(scratch, layout.wide_rows));
    with_format(weights.format, [&](auto format) {
      multiply_rows<decltype(format)::value>(weights, tiles, panel_begin, panel_end,
                                             y + m * y_stride, y_stride);
    });
  }
  _tile_release();
}

}  // namespace edgelora::kernels::amx_bf16
