// `linear` of the ISAs with vpdpbusd, for 256- and 512-bit registers.
//
// y[m, n] = Σ_b xscale[m, b] · (scale[n, b] · dot_b [+ offset[n, b] · sum_b]),  b: blocks of 32 of
// K
//
// Codes of 16 rows × 8 K, int4, nf4 and fp4, 64 bytes, a line: one register of 512 bits, two of 256
//     │ r0: K0 K1 K2 K3 │ r1: K0 … │ … │ r15 │     low nibbles; the high nibbles are K4 … K7
// vpdpbusd adds four unsigned·signed byte products to each 32-bit lane, and a lane is a row of W:
//     dot[r] += Σ_j code[r, j]·x[j],  x broadcast, 4 bytes from memory
//
// int4: codes as they are, the sum starts at −8·Σx (zero points: zp·Σx is subtracted at the end, in
//   float, where both are exact integers).
// int8: code xor 0x80 = code + 128 is unsigned, the sum starts at −128·Σx.
// nf4, fp4: a byte table, vpshufb, of round(124.125·value) + 128 (fp4: 120·value), the sum starts
//   at −128·Σx, of nf4 at −(128 + 5/32)·Σx: its bytes are 5/32 too large on average. The rounding
//   costs at most 0.0024 (0.0031) of absmax a weight.
//
// Few rows of x, with 512 bits up to alone_rows at a time: a block's codes, 16 rows × 32 K, are
// unpacked to 8 registers (kParts times).
//   even, odd   int32, a row's dots of the block: two chains, to hide vpdpbusd's latency
//   sums        float, the rows' running y
// More rows, with 256 bits: bytes of a chunk are unpacked once for all rows of the tile, then up to
// V::kGroupRows rows of x meet 16 rows of W at a time: as many chains.
//   dots [rows][V::kParts]   int32, of one block
//   acc  [rows][V::kParts]   float, in L1
//
// V: registers that hold 16 / kParts rows of W. load, low_nibbles, high_nibbles, flip (xor 0x80),
// look_up (a codebook's bytes), broadcast4, broadcast, zero, dot (vpdpbusd), add, sub; as_floats
// (the same bits); floats as in scale.
#pragma once

#include "kernels/avx2/row_groups.h"

namespace edgelora::kernels {
namespace {

template <class V>
struct VnniIsa {
  using Ints = typename V::Ints;
  using Floats = typename V::Floats;

  static constexpr int kGroupRows = V::kGroupRows;
  static constexpr int kFewRows = V::kFewRows;
  static constexpr int pair_rows(Format) { return 0; }
  // Emerald Rapids from memory, two threads: none 22 GB/s, 2 KB 25, 4 KB 30, 8 KB 31.
  static constexpr int64_t kPrefetchBytes = 6144;

  static int32_t term_zero(Format format) {
    if (has_codebook(format)) return -128 * 32 - codebook(format).byte_zero;
    return format == Format::kInt4 ? -8 * 32 : format == Format::kInt8 ? -128 * 32 : 0;
  }

  static constexpr bool unpacks(Format) { return true; }

  static void pack_starts(RowTile*, void*, const ScratchLayout&) {}

  // Unsigned bytes of a part (64 / kParts bytes of each line) of one block: 8 × 4 K. As a call it
  // would hand them over in memory: nf4, one row, 23 instead of 43 GB/s; int4, two rows, 20 instead
  // of 37 (Zen 4).
  template <Format kFormat>
  EDGELORA_INLINE static void unpack_part(const uint8_t* panel_codes, int64_t b, int part,
                                          Ints bytes[8]) {
    if constexpr (kFormat == Format::kInt8) {
      const uint8_t* codes = panel_codes + b * kBlockBytes + part * V::kBytes;
      for (int q = 0; q < 8; ++q) bytes[q] = V::flip(V::load(codes + 64 * q));
      return;
    }
    const uint8_t* codes = panel_codes + b * kBlockBytes / 2 + part * V::kBytes;
    for (int q = 0; q < 4; ++q) {
      const Ints line = V::load(codes + 64 * q);
      bytes[2 * q] = V::low_nibbles(line);
      bytes[2 * q + 1] = V::high_nibbles(line);
    }
    if constexpr (has_codebook(kFormat)) {
      for (int q = 0; q < 8; ++q) bytes[q] = V::template look_up<kFormat>(bytes[q]);
    }
  }

  template <Format kFormat>
  static void unpack_block(const uint8_t* panel_codes, int64_t b, uint8_t* bytes) {
    for (int part = 0; part < V::kParts; ++part) {
      Ints of[8];
      unpack_part<kFormat>(panel_codes, b, part, of);
      for (int q = 0; q < 8; ++q) V::store(bytes + 64 * q + part * V::kBytes, of[q]);
    }
  }

  template <Format kFormat>
  static Ints start(const RowTile& x, int64_t i) {
    return has_extras(kFormat) ? V::zero() : V::broadcast(x.terms[i]);
  }

  // acc + a block's contribution; i is [block, row] in the tile's small arrays.
  template <Format kFormat>
  static Floats add_block(Floats acc, Ints dot, Floats scale, Floats extra, const RowTile& x,
                          int64_t i) {
    Floats product = V::to_float(dot);
    if constexpr (kFormat == Format::kInt4ZeroPoints) {
      product = V::fnmadd(extra, V::broadcast(x.shifts[i]), product);
    } else if constexpr (kFormat == Format::kInt4Offsets) {
      acc = V::fmadd(extra, V::broadcast(x.shifts[i]), acc);
    }
    return V::fmadd(product, V::mul(scale, V::broadcast(x.scales[i])), acc);
  }

  // One row of x times a part of one block; codes: of x.
  static Ints row_dots(const Ints w[8], const int8_t* codes, Ints start) {
    Ints even = start, odd = V::zero();
#pragma GCC unroll 4
    for (int q = 0; q < 8; q += 2) {
      even = V::dot(even, w[q], V::broadcast4(codes + 4 * q));
      odd = V::dot(odd, w[q + 1], V::broadcast4(codes + 4 * q + 4));
    }
    return V::add(even, odd);
  }

  template <Format kFormat, int kRows>
  static void few_rows(const PanelView& panel, const RowTile& x, const Out& out) {
    Floats sums[V::kParts][kRows];
    for (auto& part : sums) {
      for (Floats& sum : part) sum = V::zero_floats();
    }
    for (int64_t b = 0; b < panel.blocks; ++b) {
      prefetch_block<kFormat>(panel.codes, b, kPrefetchBytes);
      for (int part = 0; part < V::kParts; ++part) {
        Ints w[8];
        unpack_part<kFormat>(panel.codes, b, part, w);
        const auto s = V::template scales<kFormat>(panel, b, part);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const int64_t i = b * kRows + r;
          const Ints dots = row_dots(w, x.codes + i * kActivationBlock, start<kFormat>(x, i));
          sums[part][r] = add_block<kFormat>(sums[part][r], dots, s.scale, s.extra, x, i);
        }
      }
    }
    for (int part = 0; part < V::kParts; ++part) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        Floats y = sums[part][r];
        if (has_codebook(kFormat)) y = V::mul(y, V::broadcast(panel.unit));
        V::store(out.to + r * out.stride + 16 / V::kParts * part, y);
      }
    }
  }

  // kRows rows of x times 16 rows of W, one block.
  template <Format kFormat, int kRows>
  static void block_dots(const uint8_t* w, const RowTile& x, int64_t i,
                         Ints dots[kRows][V::kParts]) {
    const int8_t* codes = x.codes + i * kActivationBlock;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int part = 0; part < V::kParts; ++part) dots[r][part] = start<kFormat>(x, i + r);
    }
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
      Ints wq[V::kParts];
      for (int part = 0; part < V::kParts; ++part) {
        wq[part] = V::load(w + 64 * q + part * V::kBytes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Ints xr = V::broadcast4(codes + r * kActivationBlock + 4 * q);
        for (int part = 0; part < V::kParts; ++part) {
          dots[r][part] = V::dot(dots[r][part], wq[part], xr);
        }
      }
    }
  }

  template <Format kFormat, int kRows>
  static void add_chunk(const Chunk& chunk, const RowTile& x, float* acc) {
    constexpr int kPart = 16 / V::kParts;
    for (int64_t b = 0; b < chunk.blocks; ++b) {
      const int64_t i = (chunk.first + b) * kRows;
      Ints dots[kRows][V::kParts];
      block_dots<kFormat, kRows>(chunk.bytes + b * kBlockBytes, x, i, dots);
#pragma GCC unroll 2
      for (int part = 0; part < V::kParts; ++part) {
        const int64_t column = b * kPanelRows + part * kPart;
        const Floats scale = V::load(chunk.scales + column);
        const Floats extra = has_extras(kFormat) ? V::load(chunk.extras + column) : scale;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          float* out = acc + r * kPanelRows + part * kPart;
          V::store(out, add_block<kFormat>(V::load(out), dots[r][part], scale, extra, x, i + r));
        }
      }
    }
  }
};

}  // namespace
}  // namespace edgelora::kernels
