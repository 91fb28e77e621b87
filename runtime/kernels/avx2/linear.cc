// y[m, n] = Σ_b xscale[m, b] · (scale[n, b] · dot_b [+ offset[n, b] · sum_b]),  b: blocks of 32 of
// K
//
// Codes of 16 rows × 8 K, int4 and nf4, 64 bytes, two registers (rows 0–7, rows 8–15):
//     │ r0: K0 K1 K2 K3 │ r1: K0 … │ … │ r7 │     low nibbles; the high nibbles are K4 … K7
// x is broadcast 4 bytes at a time, so a 32-bit lane is a row of W and sums only its own K.
//
// int4: maddubs(code, x) ≤ 15·127·2; eight of them, a whole block, add up to 30480 in int16, so one
//   madd with ones widens a block. Σ(code − zp)·x = Σ code·x − zp·Σx, as integers.
// int8: maddubs(|w|, x with w's sign) ≤ 128·127·2 = 32512: fits int16, but no two of them do.
// nf4: a byte table, pshufb, gives w = round(127·value); then as int8. The rounding costs at most
//   1/254 of absmax a weight (measured mean KL of a model 0.0015, beside 0.0027 for int8
//   activations).
//
// One row of x (decode): one pass over the panel, both halves at once; it runs at memory bandwidth.
//   sum0, sum1   int16 or int32, rows 0–7 and 8–15 of one block
//   acc0, acc1   float, the row's running y
// Several rows (prefill): a block's codes are unpacked once for all rows of the tile (up to 32),
// then
//   4 rows of x (int8, nf4: 2) meet 16 rows of W at a time.
//   sums [4][2]   int16 (int4) or int32 (int8, nf4)
//   acc           float [rows, 16], in L1
//   For 256 products int4 takes 8 maddubs, 8 additions and 6 loads, then 5 operations to scale: the
//   additions compete with maddubs for two of the four ports (1.6 such pairs a cycle on Zen 3).
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/registers.h"
#include "kernels/linear_driver.h"

namespace edgelora::kernels::avx2 {
namespace {

constexpr int64_t kInt4BlockBytes = 256;  // codes of 16 rows × 32 K
constexpr int64_t kInt8BlockBytes = 512;

constexpr bool signed_codes(Format format) {
  return format == Format::kInt8 || format == Format::kNf4;
}

__m256i low_nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

__m256i high_nibbles(__m256i bytes) { return low_nibbles(_mm256_srli_epi16(bytes, 4)); }

// Keeps additions where they stand: GCC would make all products first, and spill most of them.
void keep_order(__m256i* a, __m256i* b) { __asm__("" : "+x"(*a), "+x"(*b)); }

__m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

__m256i nf4_bytes(__m256i codes) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kNf4Bytes));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}

// Σ w·x of each 32-bit lane, w signed bytes.
__m256i signed_dot(__m256i magnitude, __m256i w, __m256i x) {
  return widen(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w)));
}

// What a half panel (8 rows) needs of one scale block.
struct HalfScales {
  __m256 scale;
  __m256 offset;        // kInt4Offsets
  __m256i zero_points;  // kInt4ZeroPoints, int32 lanes
};

template <Format kFormat>
HalfScales load_scales(const PanelView& panel, int64_t b, int half) {
  const int64_t i = b >> panel.shift;
  HalfScales s{};
  if constexpr (kFormat == Format::kNf4) {
    s.scale = _mm256_loadu_ps(panel.absmax + i * 16 + half * 8);
  } else {
    s.scale = load_half8(panel.scales + i * 16 + half * 8);
  }
  if constexpr (kFormat == Format::kInt4Offsets) {
    s.offset = load_half8(panel.offsets + i * 16 + half * 8);
  }
  if constexpr (kFormat == Format::kInt4ZeroPoints) {
    const __m128i packed =
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(panel.zero_points + i * 8));
    const __m256i bytes = _mm256_cvtepu8_epi32(packed);
    s.zero_points = half == 0 ? low_nibbles(bytes) : _mm256_srli_epi32(bytes, 4);
  }
  return s;
}

// acc + the block's contribution; i is [block, row] in the tile's small arrays.
template <Format kFormat>
__m256 add_block(__m256 acc, __m256i dot, const HalfScales& s, const RowTile& x, int64_t i) {
  if constexpr (kFormat == Format::kInt4) {
    dot = _mm256_sub_epi32(dot, _mm256_set1_epi32(x.terms[i]));
  } else if constexpr (kFormat == Format::kInt4ZeroPoints) {
    // zp < 16 leaves the upper 16 bits zero, and |Σx| ≤ 4064 fits the lower ones: madd multiplies.
    const __m256i sum = _mm256_set1_epi32(x.terms[i]);
    dot = _mm256_sub_epi32(dot, _mm256_madd_epi16(s.zero_points, sum));
  } else if constexpr (kFormat == Format::kInt4Offsets) {
    acc = fma(s.offset, _mm256_set1_ps(x.shifts[i]), acc);
  }
  const __m256 scale = _mm256_mul_ps(s.scale, _mm256_set1_ps(x.scales[i]));
  return fma(_mm256_cvtepi32_ps(dot), scale, acc);
}

struct Dots {  // of one block
  __m256i rows0_7;
  __m256i rows8_15;
};

Dots int4_dots(const uint8_t* codes, const int8_t* x) {
  __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0;
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m256i x0 = broadcast4(x + 8 * q), x1 = broadcast4(x + 8 * q + 4);
    const __m256i c0 = load_bytes(codes + 64 * q), c1 = load_bytes(codes + 64 * q + 32);
    sum0 = _mm256_add_epi16(sum0, _mm256_maddubs_epi16(low_nibbles(c0), x0));
    sum1 = _mm256_add_epi16(sum1, _mm256_maddubs_epi16(low_nibbles(c1), x0));
    keep_order(&sum0, &sum1);
    sum0 = _mm256_add_epi16(sum0, _mm256_maddubs_epi16(high_nibbles(c0), x1));
    sum1 = _mm256_add_epi16(sum1, _mm256_maddubs_epi16(high_nibbles(c1), x1));
    keep_order(&sum0, &sum1);
  }
  return {widen(sum0), widen(sum1)};
}

Dots int8_dots(const uint8_t* codes, const int8_t* x) {
  __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0;
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    const __m256i xq = broadcast4(x + 4 * q);
    const __m256i w0 = load_bytes(codes + 64 * q), w1 = load_bytes(codes + 64 * q + 32);
    sum0 = _mm256_add_epi32(sum0, signed_dot(_mm256_abs_epi8(w0), w0, xq));
    sum1 = _mm256_add_epi32(sum1, signed_dot(_mm256_abs_epi8(w1), w1, xq));
    keep_order(&sum0, &sum1);
  }
  return {sum0, sum1};
}

// |x|·(byte with x's sign): table bytes are never −128, and |x| serves both halves.
__m256i nf4_dot(__m256i codes, __m256i magnitude, __m256i x) {
  return widen(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(nf4_bytes(codes), x)));
}

Dots nf4_dots(const uint8_t* codes, const int8_t* x) {
  __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0;
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m256i x0 = broadcast4(x + 8 * q), x1 = broadcast4(x + 8 * q + 4);
    const __m256i m0 = _mm256_abs_epi8(x0), m1 = _mm256_abs_epi8(x1);
    const __m256i c0 = load_bytes(codes + 64 * q), c1 = load_bytes(codes + 64 * q + 32);
    sum0 = _mm256_add_epi32(sum0, nf4_dot(low_nibbles(c0), m0, x0));
    sum1 = _mm256_add_epi32(sum1, nf4_dot(low_nibbles(c1), m0, x0));
    keep_order(&sum0, &sum1);
    sum0 = _mm256_add_epi32(sum0, nf4_dot(high_nibbles(c0), m1, x1));
    sum1 = _mm256_add_epi32(sum1, nf4_dot(high_nibbles(c1), m1, x1));
    keep_order(&sum0, &sum1);
  }
  return {sum0, sum1};
}

template <Format kFormat>
Dots block_dots(const uint8_t* panel_codes, int64_t b, const int8_t* x) {
  if constexpr (kFormat == Format::kInt8) return int8_dots(panel_codes + b * kInt8BlockBytes, x);
  if constexpr (kFormat == Format::kNf4) return nf4_dots(panel_codes + b * kInt4BlockBytes, x);
  return int4_dots(panel_codes + b * kInt4BlockBytes, x);
}

// The codes that one_row wants about eight blocks later; the panels that follow lie behind this
// one, and a prefetch beyond the last does nothing.
template <Format kFormat>
void prefetch_block(const uint8_t* panel_codes, int64_t b) {
  constexpr int64_t kBytes = kFormat == Format::kInt8 ? kInt8BlockBytes : kInt4BlockBytes;
  const auto* ahead = reinterpret_cast<const char*>(panel_codes) + b * kBytes + 2048;
  for (int64_t i = 0; i < kBytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T0);
}

template <Format kFormat>
void one_row(const PanelView& panel, const RowTile& x, float* acc) {
  __m256 acc0 = _mm256_setzero_ps(), acc1 = acc0;
  for (int64_t b = 0; b < panel.blocks; ++b) {
    prefetch_block<kFormat>(panel.codes, b);
    const Dots dots = block_dots<kFormat>(panel.codes, b, x.codes + b * kActivationBlock);
    acc0 = add_block<kFormat>(acc0, dots.rows0_7, load_scales<kFormat>(panel, b, 0), x, b);
    acc1 = add_block<kFormat>(acc1, dots.rows8_15, load_scales<kFormat>(panel, b, 1), x, b);
  }
  _mm256_store_ps(acc, acc0);
  _mm256_store_ps(acc + 8, acc1);
}

// Bytes of one block as unsigned nibbles (int4) or signed bytes: [8 q][16 rows][4 K], K = 4q + j.
struct alignas(64) BlockBytes {
  uint8_t of[kInt8BlockBytes];
};

// int8 lies so already; nibbles and table bytes are put into `out`.
template <Format kFormat>
const uint8_t* block_bytes(const uint8_t* panel_codes, int64_t b, BlockBytes* out) {
  if constexpr (kFormat == Format::kInt8) return panel_codes + b * kInt8BlockBytes;
  const uint8_t* codes = panel_codes + b * kInt4BlockBytes;
  for (int i = 0; i < 8; ++i) {  // line i / 2, half i % 2
    const __m256i bytes = load_bytes(codes + 32 * i);
    __m256i low = low_nibbles(bytes), high = high_nibbles(bytes);
    if constexpr (kFormat == Format::kNf4) low = nf4_bytes(low), high = nf4_bytes(high);
    uint8_t* to = out->of + i / 2 * 128 + i % 2 * 32;
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64), high);
  }
  return out->of;
}

// sum + 4 K of 8 rows of W times one row of x: int16 lanes for nibbles, else int32.
template <Format kFormat>
__m256i add_products(__m256i sum, __m256i w, __m256i magnitude, __m256i x) {
  if constexpr (signed_codes(kFormat)) {
    return _mm256_add_epi32(sum, signed_dot(magnitude, w, x));
  }
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
}

// kRows rows of x times 16 rows of W, one block; i is [block, first row] in the tile.
template <Format kFormat, int kRows>
void block_of_rows(const uint8_t* w, const HalfScales scales[2], const RowTile& x, int64_t i,
                   float* acc) {
  constexpr bool kNibbles = !signed_codes(kFormat);
  const int8_t* codes = x.codes + i * kActivationBlock;
  __m256i sums[kRows][2] = {};
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    const __m256i w0 = load_bytes(w + 64 * q), w1 = load_bytes(w + 64 * q + 32);
    const __m256i m0 = kNibbles ? w0 : _mm256_abs_epi8(w0);
    const __m256i m1 = kNibbles ? w1 : _mm256_abs_epi8(w1);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256i xr = broadcast4(codes + r * kActivationBlock + 4 * q);
      sums[r][0] = add_products<kFormat>(sums[r][0], w0, m0, xr);
      sums[r][1] = add_products<kFormat>(sums[r][1], w1, m1, xr);
      keep_order(&sums[r][0], &sums[r][1]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i dot = kNibbles ? widen(sums[r][half]) : sums[r][half];
      float* out = acc + r * kPanelRows + half * 8;
      const __m256 sum = add_block<kFormat>(_mm256_load_ps(out), dot, scales[half], x, i + r);
      _mm256_store_ps(out, sum);
    }
  }
}

template <Format kFormat>
void many_rows(const PanelView& panel, const RowTile& x, float* acc) {
  for (int64_t i = 0; i < x.rows * kPanelRows; ++i) acc[i] = 0.0f;
  constexpr int kTileRows = signed_codes(kFormat) ? 2 : 4;  // what sixteen registers hold
  BlockBytes bytes;
  for (int64_t b = 0; b < panel.blocks; ++b) {
    const uint8_t* w = block_bytes<kFormat>(panel.codes, b, &bytes);
    const HalfScales scales[2] = {load_scales<kFormat>(panel, b, 0),
                                  load_scales<kFormat>(panel, b, 1)};
    int64_t m = 0;
    for (; kTileRows == 4 && m + 4 <= x.rows; m += 4) {
      block_of_rows<kFormat, kTileRows>(w, scales, x, b * x.rows + m, acc + m * kPanelRows);
    }
    for (; m + 2 <= x.rows; m += 2) {
      block_of_rows<kFormat, 2>(w, scales, x, b * x.rows + m, acc + m * kPanelRows);
    }
    if (m < x.rows) block_of_rows<kFormat, 1>(w, scales, x, b * x.rows + m, acc + m * kPanelRows);
  }
}

struct Isa {
  static int32_t term_factor(Format format) {
    return format == Format::kInt4 ? 8 : format == Format::kInt4ZeroPoints ? 1 : 0;
  }

  template <Format kFormat>
  static void panel(const PanelView& view, const RowTile& x, float* acc) {
    if (x.rows == 1) {
      one_row<kFormat>(view, x, acc);
    } else {
      many_rows<kFormat>(view, x, acc);
    }
  }
};

}  // namespace

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch) {
  drive_linear<Isa>(weights, x, panel_begin, panel_end, y, y_stride, scratch);
}

}  // namespace edgelora::kernels::avx2
