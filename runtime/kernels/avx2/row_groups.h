// What `linear` does around the inner loops of the x86 ISAs, which block rows of x in registers:
//
//   for each tile of up to kRowTile rows     dealt evenly to groups: alone_rows, or pair_rows
//     for each panel
//       few rows     Isa::few_rows           y straight from the packed codes
//       more         for each chunk of K     unpacked once to bytes and float scales, in L1
//                      for each group        Isa::add_chunk: acc [rows, 16] +=
//                      acc → y
//     or two panels together, of ISAs and formats that have pair_rows
//       for each group                       Isa::panel_pair: y of both
//   What goes straight to y does so by way of acc where the last panel of W is not full.
#pragma once

#include "kernels/avx2/registers.h"
#include "kernels/linear_driver.h"

namespace edgelora::kernels {
namespace {

constexpr int64_t kChunkBlocks = 16;  // blocks of 32 K: 8 KB of bytes
// The same for so few groups of rows that memory is waited for: a chunk is fetched ahead at once,
// and no more than some twenty lines can be on their way (AVX2, 2 rows from memory: 0.51 → 0.63 of
// the stream; 4 rows 0.49 → 0.62).
constexpr int64_t kFewGroups = 2, kFewChunkBlocks = 4;
constexpr int64_t kBlockBytes = 512;  // one byte for each weight of 16 rows × 32 K

// A chunk of one panel, for all groups of a tile.
struct Chunk {
  int64_t first, blocks;  // of 32 K
  const uint8_t* bytes;   // [blocks][8 q][16 rows][4 K], K = 4q + j
  const float* scales;    // [blocks][16]
  const float* extras;    // [blocks][16] zero points or offsets, of the formats that have them
};

struct ChunkMemory {
  alignas(64) uint8_t bytes[kChunkBlocks * kBlockBytes];
  alignas(64) float scales[kChunkBlocks * kPanelRows];
  alignas(64) float extras[kChunkBlocks * kPanelRows];
};

constexpr bool has_extras(Format format) {
  return format == Format::kInt4ZeroPoints || format == Format::kInt4Offsets;
}

inline const __m128i* as_m128(const void* from) { return static_cast<const __m128i*>(from); }

// The codes that a loop over blocks wants `bytes` later: caches fetch ahead by themselves, but not
// from the next page. The panels that follow lie behind this one; beyond the last it does nothing.
template <Format kFormat>
void prefetch_block(const uint8_t* panel_codes, int64_t b, int64_t bytes) {
  constexpr int64_t kBytes = kFormat == Format::kInt8 ? kBlockBytes : kBlockBytes / 2;
  const auto* ahead = reinterpret_cast<const char*>(panel_codes) + b * kBytes + bytes;
#pragma GCC unroll 8
  for (int64_t line = 0; line < kBytes; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
}

// Zero points of rows 8·half … 8·half + 7 of a scale block.
inline __m256 load_zero_points(const uint8_t* zero_points, int half) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(as_m128(zero_points)));
  const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(half == 0 ? low : _mm256_srli_epi32(bytes, 4));
}

// What a half panel (8 rows) needs of one scale block.
struct HalfScales {
  __m256 scale;
  __m256 extra;
};

template <Format kFormat>
HalfScales load_scales(const PanelView& panel, int64_t b, int half) {
  const int64_t i = b >> panel.shift;
  HalfScales s{load_half8(panel.scales + i * 16 + half * 8), _mm256_setzero_ps()};
  if constexpr (kFormat == Format::kInt4Offsets) {
    s.extra = load_half8(panel.offsets + i * 16 + half * 8);
  }
  if constexpr (kFormat == Format::kInt4ZeroPoints) {
    s.extra = load_zero_points(panel.zero_points + i * 8, half);
  }
  return s;
}

template <class Isa, Format kFormat>
Chunk unpack_chunk(const PanelView& panel, int64_t first, int64_t blocks, ChunkMemory* memory) {
  Chunk chunk{first, blocks, memory->bytes, memory->scales, memory->extras};
  for (int64_t b = 0; b < blocks; ++b) {
    for (int half = 0; half < 2; ++half) {
      const HalfScales s = load_scales<kFormat>(panel, first + b, half);
      _mm256_store_ps(memory->scales + b * 16 + half * 8, s.scale);
      if (has_extras(kFormat)) _mm256_store_ps(memory->extras + b * 16 + half * 8, s.extra);
    }
  }
  if constexpr (Isa::unpacks(kFormat)) {
    for (int64_t b = 0; b < blocks; ++b) {
      prefetch_block<kFormat>(panel.codes, first + b, Isa::kPrefetchBytes);
      Isa::template unpack_block<kFormat>(panel.codes, first + b, memory->bytes + b * kBlockBytes);
    }
  } else {
    chunk.bytes = panel.codes + first * kBlockBytes;
  }
  return chunk;
}

// The rows of one tile.
struct RowGroups {
  int64_t rows;
  int64_t count;
  bool paired;  // meet two panels at a time
  RowTile of[kRowTile];
};

// What multiplies a format's extras: Σ codes for zero points, scale · Σ codes for offsets.
inline void pack_extra_factors(const Activations& x, int64_t first_row, Format format,
                               RowTile* tile, void* scratch, const ScratchLayout& layout) {
  if (format == Format::kInt4Offsets) return pack_shifts(x, first_row, tile, scratch, layout);
  auto* sums = reinterpret_cast<float*>(at(scratch, layout.terms));
  for (int64_t m = 0; m < tile->rows; ++m) {
    const int32_t* from = x.sums + (first_row + m) * tile->blocks;
    for (int64_t b = 0; b < tile->blocks; ++b) {
      sums[b * tile->rows + m] = static_cast<float>(from[b]);
    }
  }
  tile->shifts = sums;
}

// Rows that are faster with one panel at a time where each block is scaled by itself: two panels
// are 0.81 to 1.1 times as fast with 4 rows, 0.93 to 1.4 with 8 (Ice Lake, from memory).
constexpr int kFewAlone = 4;

// Rows of a group that meets one panel at a time, at most. Where more rows pair their panels only
// int4 whose x is not grouped, which nobody asks for, has more of them.
template <class Isa>
constexpr int alone_rows(Format format) {
  return Isa::pair_rows(format) > 0 ? kFewAlone : Isa::kGroupRows;
}

// Whether several rows of x meet two panels at a time, in groups of at most Isa::pair_rows.
template <class Isa>
bool pairs_panels(const Weights& weights, const Activations& x, int64_t rows) {
  if (Isa::pair_rows(weights.format) == 0) return false;
  if (weights.format != Format::kInt4) return rows > kFewAlone;
  return x.grouped && rows > (weights.block_size > kActivationBlock ? 1 : kFewAlone);
}

// Where a group's part lies; `slot` rows of the tile are before it.
inline ScratchLayout group_layout(const Weights& weights, int64_t slot) {
  ScratchLayout layout = scratch_layout(weights);
  const int64_t blocks = activation_blocks(weights.in_features);
  const int64_t groups = activation_groups(weights.in_features);
  layout.codes += slot * blocks * kActivationBlock;
  layout.scales += slot * blocks * 4;
  layout.terms += slot * blocks * 4;
  layout.group_scales += slot * groups * 4;
  layout.magics += slot * groups * kGroupBlocks * 4;
  layout.magic_steps += slot * groups * kGroupBlocks * 4;
  layout.starts += slot * blocks * 8;
  layout.wide += slot * blocks;
  return layout;
}

// One group, `paired` as all of them.
template <class Isa>
RowTile pack_group(const Weights& weights, const Activations& x, int64_t first_row, int64_t rows,
                   bool paired, void* scratch, const ScratchLayout& layout) {
  RowTile tile{};
  tile.rows = rows;
  tile.blocks = activation_blocks(weights.in_features);
  if constexpr (Isa::pair_rows(Format::kInt4) > 0) {
    if (paired && weights.format == Format::kInt4) {
      pack_codes(x, first_row, tile.blocks, &tile, scratch, layout);
      Isa::pack_pairs(weights, x, first_row, &tile, scratch, layout);
      return tile;
    }
  }
  if (rows == 1) {
    tile.codes = x.codes + first_row * tile.blocks * kActivationBlock;
    tile.scales = x.scales + first_row * tile.blocks;
  } else {
    pack_codes(x, first_row, tile.blocks, &tile, scratch, layout);
    pack_scales(x, first_row, &tile, scratch, layout);
  }
  if (has_extras(weights.format)) {
    pack_extra_factors(x, first_row, weights.format, &tile, scratch, layout);
  } else if (Isa::term_zero(weights.format) != 0) {
    pack_terms(x, first_row, Isa::term_zero(weights.format), &tile, scratch, layout);
  }
  if (has_codebook(weights.format)) Isa::pack_starts(&tile, scratch, layout);
  return tile;
}

template <class Isa>
void deal_rows(const Weights& weights, const Activations& x, int64_t first_row, RowGroups* groups,
               void* scratch) {
  groups->rows = min_of(kRowTile, x.rows - first_row);
  groups->paired = pairs_panels<Isa>(weights, x, groups->rows);
  groups->count = ceil_div(groups->rows, groups->paired ? Isa::pair_rows(weights.format)
                                                        : alone_rows<Isa>(weights.format));
  int64_t slot = 0;
  for (int64_t g = 0; g < groups->count; ++g) {
    const int64_t rows = (groups->rows - slot) / (groups->count - g);
    const ScratchLayout layout = group_layout(weights, slot);
    groups->of[g] =
        pack_group<Isa>(weights, x, first_row + slot, rows, groups->paired, scratch, layout);
    slot += rows;
  }
}

// Where 16 results of each row go.
struct Out {
  float* to;
  int64_t stride;  // floats from a row to the next
};

// Straight to y; of a panel with fewer than 16 rows of W to acc, from which store_part takes them.
inline Out out_of(const Weights& weights, int64_t panel, const Out& y, float* acc) {
  if (panel_rows(weights, panel) < kPanelRows) return {acc, kPanelRows};
  return {y.to + panel * kPanelRows, y.stride};
}

inline void store_part(const Weights& weights, int64_t panel, int64_t rows, const float* acc,
                       const Out& y) {
  const int64_t columns = panel_rows(weights, panel);
  if (columns < kPanelRows) store_tile(acc, rows, columns, y.to + panel * kPanelRows, y.stride);
}

// add_chunk for the group's number of rows, a constant of the code.
template <class Isa, Format kFormat, int kRows>
void add_chunk(const Chunk& chunk, const RowTile& group, float* acc) {
  if constexpr (kRows > 1) {
    if (group.rows < kRows) return add_chunk<Isa, kFormat, kRows - 1>(chunk, group, acc);
  }
  Isa::template add_chunk<kFormat, kRows>(chunk, group, acc);
}

template <class Isa, Format kFormat, int kRows>
void few_rows(const PanelView& panel, const RowTile& group, const Out& out) {
  if constexpr (kRows > 1) {
    if (group.rows < kRows) return few_rows<Isa, kFormat, kRows - 1>(panel, group, out);
  }
  Isa::template few_rows<kFormat, kRows>(panel, group, out);
}

// Isa::few_rows of all groups.
template <class Isa, Format kFormat>
void multiply_few(const PanelView& panel, const RowGroups& groups, Out out) {
  constexpr int kRows = min_of(Isa::kFewRows, alone_rows<Isa>(kFormat));
  for (int64_t g = 0; g < groups.count; ++g) {
    few_rows<Isa, kFormat, kRows>(panel, groups.of[g], out);
    out.to += groups.of[g].rows * out.stride;
  }
}

template <class Isa, Format kFormat>
void multiply_chunks(const PanelView& panel, const RowGroups& groups, ChunkMemory* memory,
                     float* acc) {
  std::memset(acc, 0, static_cast<size_t>(groups.rows * kPanelRows) * sizeof(float));
  const int64_t most = groups.count <= kFewGroups ? kFewChunkBlocks : kChunkBlocks;
  const int64_t chunks = ceil_div(panel.blocks, most);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = panel.blocks * c / chunks, end = panel.blocks * (c + 1) / chunks;
    const Chunk chunk = unpack_chunk<Isa, kFormat>(panel, first, end - first, memory);
    float* to = acc;
    for (int64_t g = 0; g < groups.count; ++g) {
      add_chunk<Isa, kFormat, Isa::kGroupRows>(chunk, groups.of[g], to);
      to += groups.of[g].rows * kPanelRows;
    }
  }
  scale_tile(panel.unit, groups.rows, acc);
}

// What one group fetches of the panels that follow, so that all of it is there when the last group
// is done. Each fetching a bit ahead of itself would miss the second panel of the next pair.
struct Ahead {
  const char* from;
  int64_t lines;  // with each block
};

// The same for Isa::panel_pair.
template <class Isa, Format kFormat, int kRows, int kPanels>
void panel_pair(const PanelView panels[], const RowTile& group, const Out out[],
                const Ahead& ahead) {
  if constexpr (kRows > 1) {
    if (group.rows < kRows) {
      return panel_pair<Isa, kFormat, kRows - 1, kPanels>(panels, group, out, ahead);
    }
  }
  Isa::template panel_pair<kFormat, kRows, kPanels>(panels, group, out, ahead);
}

// Whether panels are taken one by one after all: the rows of one group wait for memory, which is
// faster as one stream than as two further apart (K = 2048, 2 rows, Zen 4: 17 → 27 GB/s).
template <class Isa>
bool streams_panels(const Weights& weights, const RowGroups& groups) {
  return groups.count == 1 && panel_code_bytes(weights) > Isa::kPrefetchBytes;
}

// kPanels panels from p on.
template <class Isa, Format kFormat, int kPanels>
void multiply_pair(const Weights& weights, const RowGroups& groups, int64_t p, float* y,
                   int64_t y_stride) {
  alignas(64) float acc[kRowTile * kPanelRows];  // of the last panel of W, if it is not full
  PanelView panels[kPanels];
  Out out[kPanels];
  for (int i = 0; i < kPanels; ++i) {
    panels[i] = panel_view(weights, p + i);
    out[i] = out_of(weights, p + i, {y, y_stride}, acc);
  }
  constexpr int64_t kLines = kPanels * (kFormat == Format::kInt8 ? 8 : 4);  // of a block
  const int64_t blocks = panels[0].blocks;
  const auto* codes = reinterpret_cast<const char*>(panels[0].codes);
  const bool streams = streams_panels<Isa>(weights, groups);
  Ahead ahead{codes + (streams ? Isa::kPrefetchBytes : blocks * kLines * 64),
              ceil_div(kLines, groups.count)};
  for (int64_t g = 0; g < groups.count; ++g) {
    panel_pair<Isa, kFormat, Isa::pair_rows(kFormat), kPanels>(panels, groups.of[g], out, ahead);
    ahead.from += blocks * ahead.lines * 64;
    for (Out& each : out) each.to += groups.of[g].rows * each.stride;
  }
  store_part(weights, p + kPanels - 1, groups.rows, acc, {y, y_stride});
}

template <class Isa, Format kFormat>
void multiply_panels(const Weights& weights, const RowGroups& groups, int64_t panel_begin,
                     int64_t panel_end, float* y, int64_t y_stride) {
  if constexpr (Isa::pair_rows(kFormat) > 0) {
    if (groups.paired) {
      int64_t p = panel_begin;
      const bool streams = streams_panels<Isa>(weights, groups);
      for (; p + 1 < panel_end && !streams; p += 2) {
        multiply_pair<Isa, kFormat, 2>(weights, groups, p, y, y_stride);
      }
      for (; p < panel_end; ++p) multiply_pair<Isa, kFormat, 1>(weights, groups, p, y, y_stride);
      return;
    }
  }
  alignas(64) float acc[kRowTile * kPanelRows];
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    if constexpr (Isa::kFewRows < Isa::kGroupRows) {
      if (groups.rows > Isa::kFewRows) {
        ChunkMemory memory;
        multiply_chunks<Isa, kFormat>(panel_view(weights, p), groups, &memory, acc);
        store_tile(acc, groups.rows, panel_rows(weights, p), y + p * kPanelRows, y_stride);
        continue;
      }
    }
    multiply_few<Isa, kFormat>(panel_view(weights, p), groups,
                               out_of(weights, p, {y, y_stride}, acc));
    store_part(weights, p, groups.rows, acc, {y, y_stride});
  }
}

template <class Isa>
void multiply_tile(const Weights& weights, const RowGroups& groups, int64_t panel_begin,
                   int64_t panel_end, float* y, int64_t y_stride) {
  with_format(weights.format, [&](auto format) {
    multiply_panels<Isa, decltype(format)::value>(weights, groups, panel_begin, panel_end, y,
                                                  y_stride);
  });
}

template <class Isa>
void drive_row_groups(const Weights& weights, const Activations& x, int64_t panel_begin,
                      int64_t panel_end, float* y, int64_t y_stride, void* scratch) {
  assert(weights.format != Format::kFloat);
  if (x.rows == 1) {  // not kept: that far in a scratch that has left the caches it would come late
    RowGroups alone;
    deal_rows<Isa>(weights, x, 0, &alone, scratch);
    return multiply_tile<Isa>(weights, alone, panel_begin, panel_end, y, y_stride);
  }
  for (int64_t m = 0; m < x.rows; m += kRowTile) {
    const auto pack = [&](RowGroups* groups) { deal_rows<Isa>(weights, x, m, groups, scratch); };
    multiply_tile<Isa>(weights, packed_tile<RowGroups>(weights, x, scratch, pack), panel_begin,
                       panel_end, y + m * y_stride, y_stride);
  }
}

}  // namespace
}  // namespace edgelora::kernels
