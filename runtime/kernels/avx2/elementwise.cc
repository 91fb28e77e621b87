// Activations → int8 blocks, embedding rows and SwiGLU.
//
//   code = round_half_even(x · (127 / amax)) of 32 values, four registers; activation_block.h
//   w[k] of one row: 4 bytes of every 64 of its panel
//   out = gate / (1 + e^−gate) · up
//   e^x = 2^n · p(r), n = round(x / ln 2), r = x − n·ln 2 in two parts; p: Taylor's to r^7/5040, at
//   |r| ≤ 0.347 truncated by 5e-9 of the value: the error is float32's own rounding (≤ 2 ulp).
#include <cmath>

#include "kernels/activation_block.h"
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/registers.h"
#include "kernels/row_values.h"

namespace edgelora::kernels::avx2 {
namespace {

constexpr float kExpOverflow = 88.72f;  // e^x is Inf above
constexpr float kExpLowest = -87.0f;    // e^x < 2e-38 below, nothing beside 1
constexpr float kInverseFactorials[] = {1.0f,      1.0f,       0.5f,       1.0f / 6,
                                        1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};

__m256 magnitude(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

float largest_lane(__m256 v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

int32_t sum_lanes(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

int32_t quantize_full_block(const float* x, int8_t* codes, float* scale) {
  __m256 v[4];
  __m256 amax = _mm256_setzero_ps(), odd = amax;
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_loadu_ps(x + 8 * i);
    const __m256 size = magnitude(v[i]);
    amax = _mm256_max_ps(amax, size);
    odd = _mm256_or_ps(odd, _mm256_cmp_ps(size, _mm256_set1_ps(kLargestFinite), _CMP_NLE_UQ));
  }
  const BlockScale block = block_scale_of(largest_lane(amax), _mm256_movemask_ps(odd) == 0);
  *scale = block.scale;
  __m256i words[4];
  for (int i = 0; i < 4; ++i) {
    words[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], _mm256_set1_ps(block.inverse)));
  }
  // Packing works within 128-bit halves; the permutation undoes their interleaving.
  const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(words[0], words[1]),
                                           _mm256_packs_epi32(words[2], words[3]));
  __m256i bytes = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  if (block.inverse == 0.0f) bytes = _mm256_setzero_si256();  // Inf · 0 is no code
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
  return sum_lanes(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// NaN stays NaN: min and max return their second operand then.
__m256 exp8(__m256 x) {
  const __m256 bounded =
      _mm256_max_ps(_mm256_set1_ps(kExpLowest), _mm256_min_ps(_mm256_set1_ps(kExpOverflow), x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(bounded, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = fma(n, _mm256_set1_ps(-0.693359375f), bounded);  // 355/512: n times it is exact
  r = fma(n, _mm256_set1_ps(2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(kInverseFactorials[7]);
  for (int i = 6; i >= 0; --i) p = fma(p, r, _mm256_set1_ps(kInverseFactorials[i]));
  // 2^n in two factors: n reaches 128, which no exponent field holds.
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  const __m256 value =
      _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
  const __m256 over = _mm256_cmp_ps(x, _mm256_set1_ps(kExpOverflow), _CMP_GT_OQ);
  return _mm256_blendv_ps(value, _mm256_set1_ps(HUGE_VALF), over);
}

__m256 swiglu8(__m256 gate, __m256 up) {
  const __m256 negated = _mm256_xor_ps(gate, _mm256_set1_ps(-0.0f));
  const __m256 divisor = _mm256_add_ps(_mm256_set1_ps(1.0f), exp8(negated));
  return _mm256_mul_ps(_mm256_div_ps(gate, divisor), up);
}

__m128 scaled(__m128i integers, __m128 scale) {
  return _mm_mul_ps(scale, _mm_cvtepi32_ps(integers));
}

__m128i row_bytes(const uint8_t* from) {  // 4 of them in the low lane
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return _mm_cvtsi32_si128(word);
}

struct RowScale {
  __m128 scale;
  __m128 offset;
  __m128i zero_point;
};

RowScale row_scale(const Weights& weights, int64_t row, int64_t block_in_panel) {
  const int64_t block = first_scale_block(weights, row / kPanelRows) + block_in_panel;
  const int64_t r = row % kPanelRows, i = block * kPanelRows + r;
  RowScale s{_mm_set1_ps(half_to_float(load_u16(weights.scales, i))), _mm_setzero_ps(),
             _mm_setzero_si128()};
  if (weights.format == Format::kInt4) s.zero_point = _mm_set1_epi32(8);
  if (weights.format == Format::kInt4Offsets) {
    s.offset = _mm_set1_ps(weights.exact_offsets != nullptr
                               ? load_f32(weights.exact_offsets, i)
                               : half_to_float(load_u16(weights.zero_points, i)));
  }
  if (weights.format == Format::kInt4ZeroPoints) {
    const int byte = static_cast<const uint8_t*>(weights.zero_points)[block * 8 + r % 8];
    s.zero_point = _mm_set1_epi32(r < 8 ? byte & 15 : byte >> 4);
  }
  return s;
}

// Codes of the 32 K from b·32, as int32 in eight registers.
struct RowBlock {
  __m128i of[8];
};

RowBlock row_block(const Weights& weights, int64_t row, int64_t b) {
  const uint8_t* codes = panel_codes(weights, row / kPanelRows) + row % kPanelRows * 4;
  RowBlock out;
  if (weights.format == Format::kInt8) {
    for (int q = 0; q < 8; ++q) out.of[q] = _mm_cvtepi8_epi32(row_bytes(codes + (b * 8 + q) * 64));
    return out;
  }
  for (int q = 0; q < 4; ++q) {
    const __m128i bytes = _mm_cvtepu8_epi32(row_bytes(codes + (b * 4 + q) * 64));
    out.of[2 * q] = _mm_and_si128(bytes, _mm_set1_epi32(15));
    out.of[2 * q + 1] = _mm_srli_epi32(bytes, 4);
  }
  return out;
}

void dequantize_block(const RowBlock& codes, const RowScale& s, Format format, float* out) {
  for (int q = 0; q < 8; ++q) {
    const __m128 product = scaled(_mm_sub_epi32(codes.of[q], s.zero_point), s.scale);
    _mm_storeu_ps(out + 4 * q,
                  format == Format::kInt4Offsets ? _mm_add_ps(product, s.offset) : product);
  }
}

}  // namespace

void quantize_activations(const float* x, int64_t in_features, int8_t* codes, float* scales,
                          int32_t* sums) {
  const int64_t full = in_features / kActivationBlock;
  for (int64_t b = 0; b < full; ++b) {
    const int64_t k = b * kActivationBlock;
    sums[b] = quantize_full_block(x + k, codes + k, scales + b);
  }
  const int64_t k = full * kActivationBlock;
  if (k < in_features) {
    sums[full] = quantize_block(x + k, in_features - k, codes + k, scales + full);
  }
}

void dequantize_row(const Weights& weights, int64_t row, float* out) {
  if (has_codebook(weights.format)) return codebook_row(weights, row, out);
  if (weights.format == Format::kFloat) return float_row(weights, row, out);
  for (int64_t k = 0; k < weights.in_features; k += kActivationBlock) {
    const RowBlock codes = row_block(weights, row, k / kActivationBlock);
    const RowScale scale = row_scale(weights, row, k / weights.block_size);
    const int64_t count = min_of(kActivationBlock, weights.in_features - k);
    if (count == kActivationBlock) {
      dequantize_block(codes, scale, weights.format, out + k);
    } else {
      float last[kActivationBlock];
      dequantize_block(codes, scale, weights.format, last);
      std::memcpy(out + k, last, static_cast<size_t>(count) * sizeof(float));
    }
  }
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, swiglu8(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)));
  }
  if (i == n) return;
  alignas(32) float last[3][8] = {};
  const size_t bytes = static_cast<size_t>(n - i) * sizeof(float);
  std::memcpy(last[0], gate + i, bytes);
  std::memcpy(last[1], up + i, bytes);
  _mm256_store_ps(last[2], swiglu8(_mm256_load_ps(last[0]), _mm256_load_ps(last[1])));
  std::memcpy(out + i, last[2], bytes);
}

}  // namespace edgelora::kernels::avx2
