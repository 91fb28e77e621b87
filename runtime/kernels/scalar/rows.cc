// RMS norm, the exponentials of a softmax and rotary embedding, one value at a time, sums in
// double.
//
//   out = x · weight / √(Σ x² / n + epsilon)
//   x = e^(x − most)
//   (a, b) = (a·cos − b·sin, b·cos + a·sin), a the first half of a head, b the second
#include <cmath>

#include "kernels/scalar/scalar.h"

namespace edgelora::kernels::scalar {

void rms_norm(const float* x, const float* weight, int64_t n, float epsilon, float* out) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const auto mean = static_cast<float>(sum / static_cast<double>(n));
  const float inverse = 1.0f / std::sqrt(mean + epsilon);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

float largest(const float* x, int64_t n) {
  float most = -HUGE_VALF;
  for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

float exp_minus(float* x, int64_t n, float most) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = std::exp(x[i] - most);
    sum += static_cast<double>(x[i]);
  }
  return static_cast<float>(sum);
}

void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    out[i] = a * cos[i] - b * sin[i];
    out[half + i] = b * cos[i] + a * sin[i];
  }
}

}  // namespace edgelora::kernels::scalar
