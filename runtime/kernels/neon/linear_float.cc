// y[m, n] = Σ_k w[n, k]·x[m, k], w dequantized exactly: the float32 product, then the float32 sum.
//
// A register of codes holds 4 K (8 with nibbles) of four rows, one row a 32-bit lane:
//     lane r:  │ K3 │ K2 │ K1 │ K0 │   bytes; shifting by 8j (+4) and masking leaves K j for 4 rows
// so dequantizing needs no transposition: strip [k, 16] is what the shifts yield.
//
// sums[j][g], j = k mod 4: float32 sums of rows 4g … 4g+3; four chains hide the latency of fma.
#include "kernels/float_driver.h"
#include "kernels/neon/neon.h"
#include "kernels/neon/registers.h"
#include "kernels/codebooks.h"

namespace edgelora::kernels::neon {
namespace {

// The table's 64 bytes are one lookup: float c is bytes 4c … 4c+3.
float32x4_t look_up(const float* values, int32x4_t codes) {  // lanes 0…15
  uint8x16x4_t table;
  for (int i = 0; i < 4; ++i) table.val[i] = load_bytes(values + 4 * i);
  const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100u), vreinterpretq_u32_s32(codes),
                                       0x04040404u);
  return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)));
}

// Scales of four rows for one scale block, as the format wants them.
struct Dequantizer {
  Format format;
  float32x4_t scale;
  float32x4_t offset;
  int32x4_t zero_points;

  float32x4_t operator()(int32x4_t codes) const {
    if (has_codebook(format)) {
      return vmulq_f32(look_up(codebook(format).values, codes), scale);
    }
    const float32x4_t product = vmulq_f32(scale, vcvtq_f32_s32(vsubq_s32(codes, zero_points)));
    return format == Format::kInt4Offsets ? vaddq_f32(product, offset) : product;
  }
};

int32x4_t zero_points_of(const Weights& weights, int64_t block, int g) {
  if (weights.format == Format::kInt4) return vdupq_n_s32(8);
  if (weights.format != Format::kInt4ZeroPoints) return vdupq_n_s32(0);
  const auto* packed = static_cast<const uint8_t*>(weights.zero_points) + block * 8 + g % 2 * 4;
  int32_t of[4];
  for (int i = 0; i < 4; ++i) of[i] = g < 2 ? packed[i] & 15 : packed[i] >> 4;
  return vld1q_s32(of);
}

// block counts over all panels; absmax is this panel's own.
Dequantizer dequantizer(const Weights& weights, int64_t panel, int64_t k, int g,
                        const float* absmax) {
  const int64_t in_panel = k / scale_block_size(weights);
  const int64_t block = first_scale_block(weights, panel) + in_panel;
  Dequantizer d{weights.format, vdupq_n_f32(0.0f), vdupq_n_f32(0.0f),
                zero_points_of(weights, block, g)};
  if (has_codebook(weights.format)) {
    d.scale = load_float4(absmax + in_panel * kPanelRows + 4 * g);
  } else {
    d.scale = load_half4(weights.scales + block * kPanelRows + 4 * g);
  }
  if (weights.format == Format::kInt4Offsets) {
    const int64_t at = block * kPanelRows + 4 * g;
    d.offset = weights.exact_offsets != nullptr
                   ? load_float4(weights.exact_offsets + at)
                   : load_half4(static_cast<const uint16_t*>(weights.zero_points) + at);
  }
  return d;
}

// 4 rows × 8 K of nibbles → out [8][16], four columns.
void nibbles_to_float(uint32x4_t bytes, const Dequantizer& dequantize, float* out) {
  const uint32x4_t mask = vdupq_n_u32(15);
  for (int j = 0; j < 4; ++j) {
    const uint32x4_t low = vshlq_u32(bytes, vdupq_n_s32(-8 * j));  // a left shift by less than 0
    const uint32x4_t high = vshrq_n_u32(low, 4);
    vst1q_f32(out + j * kPanelRows, dequantize(vreinterpretq_s32_u32(vandq_u32(low, mask))));
    vst1q_f32(out + (4 + j) * kPanelRows,
              dequantize(vreinterpretq_s32_u32(vandq_u32(high, mask))));
  }
}

// 4 rows × 4 K of int8 → out [4][16], four columns.
void bytes_to_float(uint32x4_t bytes, const Dequantizer& dequantize, float* out) {
  for (int j = 0; j < 4; ++j) {
    const uint32x4_t top = vshlq_u32(bytes, vdupq_n_s32(24 - 8 * j));
    vst1q_f32(out + j * kPanelRows, dequantize(vshrq_n_s32(vreinterpretq_s32_u32(top), 24)));
  }
}

struct Isa {
  // Whole blocks of 32: padding in K dequantizes to something, and nobody reads it.
  static void dequantize_strip(const Weights& weights, int64_t panel, const Strip& strip,
                               const float* absmax, float* out) {
    const bool bytes = weights.format == Format::kInt8;
    const uint8_t* codes = panel_codes(weights, panel);
    for (int64_t k = 0; k < strip.count; k += kActivationBlock) {
      for (int g = 0; g < 4; ++g) {
        const Dequantizer d = dequantizer(weights, panel, strip.begin + k, g, absmax);
        float* to = out + k * kPanelRows + 4 * g;
        const uint8_t* from = codes + (strip.begin + k) * (bytes ? 16 : 8) + 16 * g;
        for (int64_t i = 0; i < (bytes ? 8 : 4); ++i) {
          const uint32x4_t line = vreinterpretq_u32_u8(load_bytes(from + i * 64));
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
    float32x4_t sums[4][4];
    for (auto& chain : sums) {
      for (float32x4_t& sum : chain) sum = vdupq_n_f32(0.0f);
    }
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) add_column(w + (k + j) * 64, x[k + j], sums[j]);
    }
    for (; k < count; ++k) add_column(w + k * 64, x[k], sums[0]);
    for (int g = 0; g < 4; ++g) {
      const float32x4_t sum =
          vaddq_f32(vaddq_f32(sums[0][g], sums[1][g]), vaddq_f32(sums[2][g], sums[3][g]));
      add_double(vcvt_f64_f32(vget_low_f32(sum)), totals + 4 * g);
      add_double(vcvt_high_f64_f32(sum), totals + 4 * g + 2);
    }
  }

  static void add_column(const char* w, float x, float32x4_t sums[4]) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) sums[g] = vfmaq_n_f32(sums[g], load_float4(w + 16 * g), x);
  }

  static void add_double(float64x2_t sum, double* totals) {
    vst1q_f64(totals, vaddq_f64(vld1q_f64(totals), sum));
  }
};

}  // namespace

void linear_float(const Weights& weights, const float* x, int64_t rows, int64_t panel_begin,
                  int64_t panel_end, float* y, int64_t y_stride, void* scratch) {
  drive_linear_float<Isa>(weights, x, rows, panel_begin, panel_end, y, y_stride, scratch);
}

}  // namespace edgelora::kernels::neon
