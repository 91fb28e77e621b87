// RMS norm, softmax, rotary embedding, SwiGLU and embedding rows with AVX2's width.
#include "kernels/avx2/avx2.h"
#include "kernels/row_math.h"
#include "kernels/row_values.h"

namespace edgelora::kernels::avx2 {

void rms_norm(const float* x, const float* weight, int64_t n, float epsilon, float* out) {
  rms_norm_row(x, weight, n, epsilon, out);
}

float largest(const float* x, int64_t n) { return largest_of(x, n); }

float exp_minus(float* x, int64_t n, float most) { return exp_row(x, n, most); }

void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
  rotate_row(x, cos, sin, half, out);
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  swiglu_row(gate, up, n, out);
}

void dequantize_row(const Weights& weights, int64_t row, float* out) {
  row_values(weights, row, out);
}

}  // namespace edgelora::kernels::avx2
