// y[m, n] = Σ_k w[n, k]·x[m, k], w dequantized exactly: the float32 product, then the float32 sum.
//
// A register of codes holds 4 K (8 with nibbles) of 8 rows, one row a 32-bit lane:
//     lane r:  │ K3 │ K2 │ K1 │ K0 │   bytes; shifting by 8j (+4) and masking leaves K j for 8 rows
// so dequantizing needs no transposition: strip [k, 16] is what the shifts yield.
//
// sums[j][h], j = k mod 4: float32 sums of rows 8h … 8h+7; four chains hide the latency of fma.
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/registers.h"
#include "kernels/float_driver.h"
#include "kernels/codebooks.h"

namespace edgelora::kernels::avx2 {
namespace {

__m256 look_up(const float* values, __m256i codes) {  // int32 lanes 0…15
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), codes);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values + 8), codes);
  const __m256i bit3 = _mm256_slli_epi32(codes, 28);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(bit3));
}

// Scales of 8 rows for one scale block, as the format wants them.
struct Dequantizer {
  Format format;
  __m256 scale;
  __m256 offset;
  __m256i zero_points;

  __m256 operator()(__m256i codes) const {
    if (has_codebook(format)) {
      return _mm256_mul_ps(look_up(codebook(format).values, codes), scale);
    }
    const __m256 integers = _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, zero_points));
    const __m256 product = _mm256_mul_ps(scale, integers);
    return format == Format::kInt4Offsets ? _mm256_add_ps(product, offset) : product;
  }
};

__m256i zero_points_of(const Weights& weights, int64_t block, int half) {
  if (weights.format == Format::kInt4) return _mm256_set1_epi32(8);
  if (weights.format != Format::kInt4ZeroPoints) return _mm256_setzero_si256();
  const auto* packed = static_cast<const uint8_t*>(weights.zero_points) + block * 8;
  const __m256i bytes =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
  return half == 0 ? _mm256_and_si256(bytes, _mm256_set1_epi32(15)) : _mm256_srli_epi32(bytes, 4);
}

// block counts over all panels; absmax is this panel's own.
Dequantizer dequantizer(const Weights& weights, int64_t panel, int64_t k, int half,
                        const float* absmax) {
  const int64_t in_panel = k / scale_block_size(weights);
  const int64_t block = first_scale_block(weights, panel) + in_panel;
  Dequantizer d{weights.format, _mm256_setzero_ps(), _mm256_setzero_ps(),
                zero_points_of(weights, block, half)};
  if (has_codebook(weights.format)) {
    d.scale = _mm256_loadu_ps(absmax + in_panel * kPanelRows + half * 8);
  } else {
    d.scale = load_half8(weights.scales + block * kPanelRows + half * 8);
  }
  if (weights.format == Format::kInt4Offsets) {
    const int64_t at = block * kPanelRows + half * 8;
    d.offset = weights.exact_offsets != nullptr
                   ? _mm256_loadu_ps(weights.exact_offsets + at)
                   : load_half8(static_cast<const uint16_t*>(weights.zero_points) + at);
  }
  return d;
}

// 8 rows × 8 K of nibbles → out [8][16], columns 0–7.
void nibbles_to_float(__m256i bytes, const Dequantizer& dequantize, float* out) {
  const __m256i mask = _mm256_set1_epi32(15);
  for (int j = 0; j < 4; ++j) {
    const __m256i low = _mm256_and_si256(_mm256_srli_epi32(bytes, 8 * j), mask);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi32(bytes, 8 * j + 4), mask);
    _mm256_store_ps(out + j * kPanelRows, dequantize(low));
    _mm256_store_ps(out + (4 + j) * kPanelRows, dequantize(high));
  }
}

// 8 rows × 4 K of int8 → out [4][16], columns 0–7.
void bytes_to_float(__m256i bytes, const Dequantizer& dequantize, float* out) {
  for (int j = 0; j < 4; ++j) {
    const __m256i code = _mm256_srai_epi32(_mm256_slli_epi32(bytes, 24 - 8 * j), 24);
    _mm256_store_ps(out + j * kPanelRows, dequantize(code));
  }
}

struct Isa {
  // Whole blocks of 32: padding in K dequantizes to something, and nobody reads it.
  static void dequantize_strip(const Weights& weights, int64_t panel, const Strip& strip,
                               const float* absmax, float* out) {
    const bool bytes = weights.format == Format::kInt8;
    const uint8_t* codes = panel_codes(weights, panel);
    for (int64_t k = 0; k < strip.count; k += kActivationBlock) {
      for (int half = 0; half < 2; ++half) {
        const Dequantizer d = dequantizer(weights, panel, strip.begin + k, half, absmax);
        float* to = out + k * kPanelRows + half * 8;
        const uint8_t* from = codes + (strip.begin + k) * (bytes ? 16 : 8) + half * 32;
        for (int64_t i = 0; i < (bytes ? 8 : 4); ++i) {
          const __m256i line = load_bytes(from + i * 64);
          if (bytes) {
            bytes_to_float(line, d, to + i * 4 * kPanelRows);
          } else {
            nibbles_to_float(line, d, to + i * 8 * kPanelRows);
          }
        }
      }
    }
  }

  static void add_strip(const void* values, const float* x, int64_t count, double* totals) {
    const char* w = static_cast<const char*>(values);
    __m256 sums[4][2];
    for (auto& pair : sums) pair[0] = pair[1] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m256 xk = _mm256_set1_ps(x[k + j]);
        sums[j][0] = fma(load_float8(w + (k + j) * 64), xk, sums[j][0]);
        sums[j][1] = fma(load_float8(w + (k + j) * 64 + 32), xk, sums[j][1]);
      }
    }
    for (; k < count; ++k) {
      sums[0][0] = fma(load_float8(w + k * 64), _mm256_set1_ps(x[k]), sums[0][0]);
      sums[0][1] = fma(load_float8(w + k * 64 + 32), _mm256_set1_ps(x[k]), sums[0][1]);
    }
    for (int h = 0; h < 2; ++h) {
      const __m256 sum = _mm256_add_ps(_mm256_add_ps(sums[0][h], sums[1][h]),
                                       _mm256_add_ps(sums[2][h], sums[3][h]));
      add_double(_mm256_castps256_ps128(sum), totals + 8 * h);
      add_double(_mm256_extractf128_ps(sum, 1), totals + 8 * h + 4);
    }
  }

  static void add_double(__m128 sum, double* totals) {
    _mm256_storeu_pd(totals, _mm256_add_pd(_mm256_loadu_pd(totals), _mm256_cvtps_pd(sum)));
  }
};

}  // namespace

void linear_float(const Weights& weights, const float* x, int64_t rows, int64_t panel_begin,
                  int64_t panel_end, float* y, int64_t y_stride, void* scratch) {
  drive_linear_float<Isa>(weights, x, rows, panel_begin, panel_end, y, y_stride, scratch);
}

}  // namespace edgelora::kernels::avx2
