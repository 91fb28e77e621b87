// y[m, n] = Σ_b xscale[m, b] · (scale[n, b] · dot_b [+ offset[n, b] · sum_b]),  b: blocks of 32 of
// K
//
// Codes of 16 rows × 8 K, int4, nf4 and fp4, 64 bytes, two registers (rows 0–7, rows 8–15):
//     │ r0: K0 K1 K2 K3 │ r1: K0 … │ … │ r7 │     low nibbles; the high nibbles are K4 … K7
// x is broadcast 4 bytes at a time, so a 32-bit lane is a row of W and sums only its own K; an
// int16 lane has half of them.
//
// int4: maddubs(code, x) ≤ 15·127·2; eight of them, a whole block, add up to 30480 in int16, so one
//   madd with ones widens a block. Σ(code − zp)·x = Σ code·x − zp·Σx, exact integers in float.
// int8: maddubs(|w|, x with w's sign) ≤ 128·127·2 = 32512: fits int16, but no two of them do.
// nf4, fp4: a byte table, pshufb, gives levels 1…126 for −1…1 (codebooks.h); maddubs(level, x) ≤
//   126·127·2. A sum of four starts at −64·Σx: it ends as Σ(level − 64)·x, at most 63·Σ|x|, and
//   int16 holds it where Σ|x| ≤ 520 of the 8 x in a lane, overflows on the way notwithstanding. So
//   two madd widen a block; where some sum is greater (up to 1016; `wide` blocks), every product is
//   widened.
//
// One row of x (decode): one pass over the panel, both halves at once.
//   sum0, sum1   int16 or int32, rows 0–7 and 8–15 of one block
//   acc0, acc1   float, the row's running y
// Several rows: many_rows.h.
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/many_rows.h"
#include "kernels/absmax_scales.h"

namespace edgelora::kernels::avx2 {
namespace {

struct Dots {  // of one block
  __m256i rows0_7;
  __m256i rows8_15;
};

// int16: start + 16 K (two lines of codes) of 16 rows of W.
template <Format kFormat>
Dots add_levels(const uint8_t* codes, const int8_t* x, __m256i start) {
  __m256i sum0 = start, sum1 = start;
#pragma GCC unroll 2
  for (int q = 0; q < 2; ++q) {
    const __m256i x0 = broadcast4(x + 8 * q), x1 = broadcast4(x + 8 * q + 4);
    const __m256i c0 = load_bytes(codes + 64 * q), c1 = load_bytes(codes + 64 * q + 32);
    sum0 = add16(sum0, _mm256_maddubs_epi16(levels<kFormat>(low_nibbles(c0)), x0));
    sum1 = add16(sum1, _mm256_maddubs_epi16(levels<kFormat>(low_nibbles(c1)), x0));
    keep_order(&sum0, &sum1);
    sum0 = add16(sum0, _mm256_maddubs_epi16(levels<kFormat>(high_nibbles(c0)), x1));
    sum1 = add16(sum1, _mm256_maddubs_epi16(levels<kFormat>(high_nibbles(c1)), x1));
    keep_order(&sum0, &sum1);
  }
  return {sum0, sum1};
}

Dots int4_dots(const uint8_t* codes, const int8_t* x) {
  __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0;
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m256i x0 = broadcast4(x + 8 * q), x1 = broadcast4(x + 8 * q + 4);
    const __m256i c0 = load_bytes(codes + 64 * q), c1 = load_bytes(codes + 64 * q + 32);
    sum0 = add16(sum0, _mm256_maddubs_epi16(low_nibbles(c0), x0));
    sum1 = add16(sum1, _mm256_maddubs_epi16(low_nibbles(c1), x0));
    keep_order(&sum0, &sum1);
    sum0 = add16(sum0, _mm256_maddubs_epi16(high_nibbles(c0), x1));
    sum1 = add16(sum1, _mm256_maddubs_epi16(high_nibbles(c1), x1));
    keep_order(&sum0, &sum1);
  }
  return {widen(sum0, 1), widen(sum1, 1)};
}

Dots int8_dots(const uint8_t* codes, const int8_t* x) {
  __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0;
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    const __m256i xq = broadcast4(x + 4 * q);
    const __m256i w0 = load_bytes(codes + 64 * q), w1 = load_bytes(codes + 64 * q + 32);
    sum0 = add32(sum0, signed_dot(_mm256_abs_epi8(w0), w0, xq));
    sum1 = add32(sum1, signed_dot(_mm256_abs_epi8(w1), w1, xq));
    keep_order(&sum0, &sum1);
  }
  return {sum0, sum1};
}

// level_scale·Σ value·x.
template <Format kFormat>
Dots level_dots(const uint8_t* codes, const RowTile& x, int64_t b) {
  const int8_t* xb = x.codes + b * kActivationBlock;
  const Dots first = add_levels<kFormat>(codes, xb, broadcast4(x.starts + 4 * b));
  const Dots second = add_levels<kFormat>(codes + 128, xb + 16, broadcast4(x.starts + 4 * b + 2));
  const __m256i term = level_term<kFormat>(x.terms[b]);
  return {add32(add32(widen(first.rows0_7, 4), term), widen(second.rows0_7, 4)),
          add32(add32(widen(first.rows8_15, 4), term), widen(second.rows8_15, 4))};
}

template <Format kFormat>
Dots wide_level_dots(const uint8_t* codes, const RowTile& x, int64_t b) {
  const int8_t* xb = x.codes + b * kActivationBlock;
  __m256i sum0 = wide_start<kFormat>(x.terms[b]), sum1 = sum0;
  for (int q = 0; q < 4; ++q) {
    const __m256i x0 = broadcast4(xb + 8 * q), x1 = broadcast4(xb + 8 * q + 4);
    const __m256i c0 = load_bytes(codes + 64 * q), c1 = load_bytes(codes + 64 * q + 32);
    sum0 = add32(sum0, level_dot(levels<kFormat>(low_nibbles(c0)), x0));
    sum1 = add32(sum1, level_dot(levels<kFormat>(low_nibbles(c1)), x0));
    sum0 = add32(sum0, level_dot(levels<kFormat>(high_nibbles(c0)), x1));
    sum1 = add32(sum1, level_dot(levels<kFormat>(high_nibbles(c1)), x1));
  }
  return {sum0, sum1};
}

template <Format kFormat>
Dots block_dots(const uint8_t* panel_codes, int64_t b, const RowTile& x) {
  const int8_t* xb = x.codes + b * kActivationBlock;
  if constexpr (kFormat == Format::kInt8) return int8_dots(panel_codes + b * kBlockBytes, xb);
  const uint8_t* codes = panel_codes + b * kInt4BlockBytes;
  if constexpr (has_codebook(kFormat)) {
    if (x.wide[b] != 0) return wide_level_dots<kFormat>(codes, x, b);
    return level_dots<kFormat>(codes, x, b);
  }
  return int4_dots(codes, xb);
}

constexpr int64_t kLargestSum = 32767 / 63;  // of |x| in a lane that is not `wide`

struct Isa {
  static constexpr int kGroupRows = 4;  // what sixteen registers hold
  static constexpr int kFewRows = 1;
  static constexpr int pair_rows(Format) { return 0; }
  static constexpr int64_t kPrefetchBytes = 2048;

  static int32_t term_zero(Format format) {
    return format == Format::kInt4 ? 8 * 32 : has_codebook(format) ? 32 : 0;
  }

  static constexpr bool unpacks(Format format) { return format != Format::kInt8; }

  template <Format kFormat>
  static void unpack_block(const uint8_t* panel_codes, int64_t b, uint8_t* bytes) {
    const uint8_t* codes = panel_codes + b * kInt4BlockBytes;
    for (int i = 0; i < 8; ++i) {  // line i / 2, half i % 2
      const __m256i line = load_bytes(codes + 32 * i);
      __m256i low = low_nibbles(line), high = high_nibbles(line);
      if constexpr (has_codebook(kFormat)) low = levels<kFormat>(low), high = levels<kFormat>(high);
      auto* to = reinterpret_cast<__m256i*>(bytes + i / 2 * 128 + i % 2 * 32);
      _mm256_store_si256(to, low);
      _mm256_store_si256(to + 2, high);
    }
  }

  // −64·Σx of each int16 lane's 8 x, and whether |x| may add up to too much in a row of a block.
  static void pack_starts(RowTile* tile, void* scratch, const ScratchLayout& layout) {
    auto* starts = reinterpret_cast<int16_t*>(at(scratch, layout.starts));
    auto* wide = reinterpret_cast<uint8_t*>(at(scratch, layout.wide));
    const __m256i ones = _mm256_set1_epi8(1), limit = _mm256_set1_epi16(kLargestSum);
    for (int64_t b = 0; b < tile->blocks; ++b) {
      __m256i too_large = _mm256_setzero_si256();
      for (int64_t i = b * tile->rows; i < (b + 1) * tile->rows; ++i) {
        const __m256i x = load_bytes(tile->codes + i * kActivationBlock);
        const __m256i sums = lane_sums(_mm256_maddubs_epi16(ones, x));
        const __m256i start = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), sums), 6);
        store4(_mm256_castsi256_si128(start), starts + i * 4);
        store4(_mm256_extracti128_si256(start, 1), starts + i * 4 + 2);
        const __m256i sizes = lane_sums(_mm256_maddubs_epi16(ones, _mm256_abs_epi8(x)));
        too_large = _mm256_or_si256(too_large, _mm256_cmpgt_epi16(sizes, limit));
      }
      wide[b] = static_cast<uint8_t>(_mm256_testz_si256(too_large, too_large) == 0);
    }
    tile->starts = starts;
    tile->wide = wide;
  }

  template <Format kFormat, int kRows>
  static void few_rows(const PanelView& panel, const RowTile& x, const Out& out) {
    __m256 acc0 = _mm256_setzero_ps(), acc1 = acc0;
    for (int64_t b = 0; b < panel.blocks; ++b) {
      prefetch_block<kFormat>(panel.codes, b, kPrefetchBytes);
      const Dots dots = block_dots<kFormat>(panel.codes, b, x);
      acc0 = add_block<kFormat>(acc0, dots.rows0_7, load_scales<kFormat>(panel, b, 0), x, b);
      acc1 = add_block<kFormat>(acc1, dots.rows8_15, load_scales<kFormat>(panel, b, 1), x, b);
    }
    if (has_codebook(kFormat)) {
      const __m256 unit = _mm256_set1_ps(panel.unit);
      acc0 = _mm256_mul_ps(acc0, unit), acc1 = _mm256_mul_ps(acc1, unit);
    }
    _mm256_storeu_ps(out.to, acc0);
    _mm256_storeu_ps(out.to + 8, acc1);
  }

  template <Format kFormat, int kRows>
  static void add_chunk(const Chunk& chunk, const RowTile& x, float* acc) {
    for (int64_t b = 0; b < chunk.blocks; ++b) {
      const int64_t i = (chunk.first + b) * kRows;
      if constexpr (kFormat == Format::kInt8) {
        add_int8_half<kRows>(chunk, b, 0, x, i, acc);
        add_int8_half<kRows>(chunk, b, 1, x, i, acc);
      } else if constexpr (has_codebook(kFormat)) {
        if (x.wide[chunk.first + b] != 0) {
          add_wide_levels_half<kFormat, kRows>(chunk, b, 0, x, i, acc);
          add_wide_levels_half<kFormat, kRows>(chunk, b, 1, x, i, acc);
        } else {
          add_levels_by_two<kFormat, kRows>(chunk, b, x, i, acc);
        }
      } else {
        add_int4<kFormat, kRows>(chunk, b, x, i, acc);
      }
    }
  }

 private:
  // The sum of the four 32-bit elements of each half, int16 lanes apart.
  static __m256i lane_sums(__m256i v) {
    v = add16(v, _mm256_shuffle_epi32(v, 0x4e));
    return add16(v, _mm256_shuffle_epi32(v, 0xb1));
  }

  static void store4(__m128i v, int16_t* to) {
    const int32_t word = _mm_cvtsi128_si32(v);
    std::memcpy(to, &word, sizeof word);
  }
};

}  // namespace

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch) {
  drive_row_groups<Isa>(weights, x, panel_begin, panel_end, y, y_stride, scratch);
}

void unpack_absmax(const Weights& weights, int64_t panel, uint16_t* scales, void* scratch) {
  unpack_absmax_panel(weights, panel, codebook(weights.format).level_scale, store_half16, scales,
                      scratch);
}

}  // namespace edgelora::kernels::avx2
