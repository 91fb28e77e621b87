// y[m, n] = Σ_b xscale[m, b] · (scale[n, b] · dot_b  [+ offset[n, b] · sum_b]),  b: blocks of 32 of
// K
//   int4          dot_b = Σ code·x − 8·Σ x
//   zero points   dot_b = Σ code·x − zp·Σ x
//   offsets       dot_b = Σ code·x, and the offset term
//   int8          dot_b = Σ code·x
//   nf4, fp4      dot_b = Σ byte[code]·x − ⌊zero·Σ x⌉, scale ≈ absmax / 124.125, / 120
//
// Codes of a panel, int4, nf4 and fp4:  [q][r][j]  64 bytes hold K = 8q … 8q+7 of 16 rows:
//     byte 4r+j:  high nibble K = 8q+4+j │ low nibble K = 8q+j
// int8: byte 4r+j of 64 is K = 4q+j of row r.
//
// One row of x and one row of W at a time; dot is an exact int32, the accumulator a float.
#include "kernels/half.h"
#include "kernels/kernels.h"
#include "kernels/linear_driver.h"
#include "kernels/absmax_scales.h"
#include "kernels/panels.h"
#include "kernels/row_values.h"
#include "kernels/scalar/scalar.h"

namespace edgelora::kernels::scalar {
namespace {

// The integer that a code stands for, before zero point and scale.
int code_value(const Weights& weights, const uint8_t* codes, int64_t r, int64_t k) {
  if (weights.format == Format::kInt8) {
    return static_cast<int8_t>(codes[k / 4 * 64 + 4 * r + k % 4]);
  }
  const uint8_t byte = codes[k / 8 * 64 + 4 * r + k % 4];
  const int code = k % 8 < 4 ? byte & 15 : byte >> 4;
  return has_codebook(weights.format) ? codebook(weights.format).bytes[code] : code;
}

int zero_point(const Weights& weights, int64_t panel, int64_t block, int64_t r) {
  if (weights.format == Format::kInt4) return 8;
  if (weights.format != Format::kInt4ZeroPoints) return 0;
  const auto* packed = static_cast<const uint8_t*>(weights.zero_points);
  const uint8_t byte = packed[(first_scale_block(weights, panel) + block) * 8 + r % 8];
  return r < 8 ? byte & 15 : byte >> 4;
}

// From absmax where it is given.
float block_scale(const Weights& weights, int64_t panel, int64_t block, int64_t r,
                  const float* absmax) {
  if (absmax != nullptr) return absmax[block * kPanelRows + r];
  return half_to_float(
      load_u16(weights.scales, (first_scale_block(weights, panel) + block) * kPanelRows + r));
}

float block_offset(const Weights& weights, int64_t panel, int64_t block, int64_t r) {
  if (weights.format != Format::kInt4Offsets) return 0.0f;
  return half_to_float(
      load_u16(weights.zero_points, (first_scale_block(weights, panel) + block) * kPanelRows + r));
}

float exact_offset(const Weights& weights, int64_t panel, int64_t block, int64_t r) {
  if (weights.exact_offsets == nullptr) return block_offset(weights, panel, block, r);
  return load_f32(weights.exact_offsets,
                  (first_scale_block(weights, panel) + block) * kPanelRows + r);
}

struct Block {  // one activation block of one row of x
  const int8_t* codes;
  float scale;
  int32_t sum;
};

float block_product(const Weights& weights, int64_t panel, int64_t r, int64_t index,
                    const Block& x) {
  const uint8_t* codes = panel_codes(weights, panel);
  int32_t dot = 0;
  for (int64_t k = 0; k < kActivationBlock; ++k) {
    dot += code_value(weights, codes, r, index * kActivationBlock + k) * x.codes[k];
  }
  const int64_t block = index * kActivationBlock / scale_block_size(weights);
  dot -= zero_point(weights, panel, block, r) * x.sum;
  if (has_codebook(weights.format)) dot += zero_term(-codebook(weights.format).byte_zero, x.sum);
  const float scale = block_scale(weights, panel, block, r, nullptr);
  return scale * x.scale * static_cast<float>(dot) +
         block_offset(weights, panel, block, r) * (x.scale * static_cast<float>(x.sum));
}

float* panel_absmax(const Weights& weights, int64_t panel, void* scratch) {
  if (!has_codebook(weights.format)) return nullptr;
  auto* absmax =
      reinterpret_cast<float*>(static_cast<char*>(scratch) + scratch_layout(weights).absmax);
  decode_absmax_panel(weights, panel, 1.0f, absmax);
  return absmax;
}

// w[r, k] exactly as edgelora/quantize computes it: the product in float32, then the sum.
float weight(const Weights& weights, int64_t panel, int64_t r, int64_t k, const float* absmax) {
  if (weights.format == Format::kFloat) {
    return load_f32(panel_codes(weights, panel), k * kPanelRows + r);
  }
  const int64_t block = k / scale_block_size(weights);
  const uint8_t* codes = panel_codes(weights, panel);
  const float scale = block_scale(weights, panel, block, r, absmax);
  if (has_codebook(weights.format)) {
    const uint8_t byte = codes[k / 8 * 64 + 4 * r + k % 4];
    const int code = k % 8 < 4 ? byte & 15 : byte >> 4;
    float value = codebook(weights.format).values[code] * scale;
    round_values(weights.rounding, &value, 1);
    return value;
  }
  const int value = code_value(weights, codes, r, k) - zero_point(weights, panel, block, r);
  const float product = scale * static_cast<float>(value);
  return weights.format == Format::kInt4Offsets ? product + exact_offset(weights, panel, block, r)
                                                : product;
}

}  // namespace

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void*) {
  const int64_t blocks = activation_blocks(weights.in_features);
  const float unit = has_codebook(weights.format) ? weights.scale_unit : 1.0f;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    for (int64_t m = 0; m < x.rows; ++m) {
      for (int64_t r = 0; r < panel_rows(weights, p); ++r) {
        float sum = 0.0f;
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t i = m * blocks + b;
          const Block block{x.codes + i * kActivationBlock, x.scales[i], x.sums[i]};
          sum += block_product(weights, p, r, b, block);
        }
        y[m * y_stride + p * kPanelRows + r] = sum * unit;
      }
    }
  }
}

void unpack_absmax(const Weights& weights, int64_t panel, uint16_t* scales, void* scratch) {
  const auto store = [](const float* from, uint16_t* to) {
    for (int64_t r = 0; r < kPanelRows; ++r) to[r] = float_to_half(from[r]);
  };
  unpack_absmax_panel(weights, panel, codebook(weights.format).byte_scale, store, scales, scratch);
}

void linear_float(const Weights& weights, const float* x, int64_t rows, int64_t panel_begin,
                  int64_t panel_end, float* y, int64_t y_stride, void* scratch) {
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const float* absmax = panel_absmax(weights, p, scratch);
    for (int64_t m = 0; m < rows; ++m) {
      const float* row = x + m * weights.in_features;
      for (int64_t r = 0; r < panel_rows(weights, p); ++r) {
        double sum = 0.0;
        for (int64_t k = 0; k < weights.in_features; ++k) {
          sum +=
              static_cast<double>(row[k]) * static_cast<double>(weight(weights, p, r, k, absmax));
        }
        y[m * y_stride + p * kPanelRows + r] = static_cast<float>(sum);
      }
    }
  }
}

void dequantize_row(const Weights& weights, int64_t row, float* out) {
  if (has_codebook(weights.format)) return codebook_row(weights, row, out);
  if (weights.format == Format::kFloat) return float_row(weights, row, out);
  for (int64_t k = 0; k < weights.in_features; ++k) {
    out[k] = weight(weights, row / kPanelRows, row % kPanelRows, k, nullptr);
  }
}

}  // namespace edgelora::kernels::scalar
