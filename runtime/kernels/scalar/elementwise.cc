// Activations → int8 blocks, the side branch and SwiGLU, one value at a time.
//
//   t[r] = weight · Σ_k a[r, k]·x[k]          a [rank, K], sum in double
//   y[16p + i] += Σ_r b[p, r, i]·t[r]         b [panels, rank, 16], sum in float
//   the same with int8 b and t: Σ an exact int32, then the scales
//   out[i] = gate[i] / (1 + e^−gate[i]) · up[i]
#include <cmath>

#include "kernels/activation_block.h"
#include "kernels/half.h"
#include "kernels/packed_factors.h"
#include "kernels/scalar/scalar.h"

namespace edgelora::kernels::scalar {
namespace {

float load_factor(const Factors& factors, const void* base, int64_t index) {
  return factors.half ? half_to_float(load_u16(base, index)) : load_f32(base, index);
}

int32_t quantize_full_block(const float* x, int8_t* codes, float* scale) {
  return quantize_block(x, kActivationBlock, codes, scale);
}

}  // namespace

void quantize_activations(const float* x, int64_t in_features, int8_t* codes, float* scales,
                          int32_t* sums) {
  quantize_blocks<quantize_full_block>(x, in_features, codes, scales, sums);
}

void side_branch_down(const Factors& factors, int64_t in_features, float weight, const float* x,
                      float* t) {
  for (int64_t r = 0; r < factors.rank; ++r) {
    double sum = 0.0;
    for (int64_t k = 0; k < in_features; ++k) {
      sum += static_cast<double>(load_factor(factors, factors.a, r * in_features + k)) *
             static_cast<double>(x[k]);
    }
    t[r] = weight * static_cast<float>(sum);
  }
}

void side_branch_up(const Factors& factors, int64_t out_features, const float* t,
                    int64_t panel_begin, int64_t panel_end, float* y) {
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const int64_t rows = min_of(kPanelRows, out_features - p * kPanelRows);
    for (int64_t i = 0; i < rows; ++i) {
      float sum = 0.0f;
      for (int64_t r = 0; r < factors.rank; ++r) {
        sum += load_factor(factors, factors.b, (p * factors.rank + r) * kPanelRows + i) * t[r];
      }
      y[p * kPanelRows + i] += sum;
    }
  }
}

void side_branch_up_int8(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                         int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride) {
  for (int64_t m = 0; m < t.rows; ++m) {
    for (int64_t n = panel_begin * kPanelRows; n < min_of(panel_end * kPanelRows, out_features);
         ++n) {
      const uint8_t* panel = packed_panel(factors, n / kPanelRows);
      const int64_t i = n % kPanelRows;
      const auto* b = reinterpret_cast<const int8_t*>(panel) + kPackedScaleBytes + 4 * i;
      const int8_t* codes = packed_codes(t, m);
      int32_t sum = 0;
      for (int64_t r = 0; r < factors.rank; ++r) sum += b[r / 4 * 64 + r % 4] * codes[r];
      y[m * y_stride + n] +=
          static_cast<float>(sum) * half_to_float(load_u16(panel, i)) * packed_scale(t, m);
    }
  }
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

}  // namespace edgelora::kernels::scalar
