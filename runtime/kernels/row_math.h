// RMS norm, the exponentials of a softmax, rotary embedding and SwiGLU, for every ISA with float
// vectors: written with the compiler's vectors as wide as the flags of the including folder allow.
//
//   rms_norm   out = x · weight / √(Σ x² / n + epsilon)
//   largest    the greatest x
//   exp_row    x = e^(x − most), returns Σ x
//   rotate     (a, b) = (a·cos − b·sin, b·cos + a·sin), a the first half of a head, b the second
//   swiglu     out = gate / (1 + e^−gate) · up; of a negative gate gate · e^gate / (1 + e^gate), so
//              that no exponent is above 0
//
//   e^x = 2^n · p(r), n = round(x / ln 2), r = x − n·ln 2 in two parts; p: Taylor's to r^7/5040, at
//   |r| ≤ 0.347 truncated by 5e-9 of the value: the error is float32's own rounding. Below −87 it
//   is 0: x ≤ 0 here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace edgelora::kernels {
namespace {

#if defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

inline Floats load_floats(const float* from) {  // unaligned
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store_floats(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline Floats broadcast_float(float value) { return Floats{} + value; }

inline float sum_of(Floats v) {
  float sum = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

inline float sum_of_squares(const float* x, int64_t n) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int64_t j = 0; j < 4; ++j) {
      const Floats v = load_floats(x + i + j * kLanes);
      sums[j] += v * v;
    }
  }
  float rest = 0.0f;
  for (; i < n; ++i) rest += x[i] * x[i];
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

inline void rms_norm_row(const float* x, const float* weight, int64_t n, float epsilon,
                         float* out) {
  const float inverse = 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + epsilon);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

// e^x of x ≤ 0; NaN stays NaN.
inline Floats exp_of(Floats x) {
  constexpr float kInverseFactorials[] = {1.0f,      1.0f,       0.5f,       1.0f / 6,
                                          1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
  const Floats bounded = x < -87.0f ? broadcast_float(-87.0f) : x;
  const Floats shifted = bounded * 1.44269504f + 0x1.8p23f;  // the integer in its lowest bits
  const Floats n = shifted - 0x1.8p23f;
  Floats r = bounded - n * 0.693359375f;  // 355/512: n times it is exact
  r = r + n * 2.12194440e-4f;
  Floats p = broadcast_float(kInverseFactorials[7]);
  for (int i = 6; i >= 0; --i) p = p * r + kInverseFactorials[i];
  Words bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // 2^n: what 1.5·2^23 left above is shifted out
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? Floats{} : p * power;
}

inline float largest_of(const float* x, int64_t n) {
  Floats most = broadcast_float(-HUGE_VALF);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats v = load_floats(x + i);
    most = v > most ? v : most;
  }
  float largest = -HUGE_VALF;
  for (int64_t j = 0; j < kLanes; ++j) largest = most[j] > largest ? most[j] : largest;
  for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

inline float exp_row(float* x, int64_t n, float most) {
  Floats sums{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats e = exp_of(load_floats(x + i) - most);
    store_floats(x + i, e);
    sums += e;
  }
  if (i == n) return sum_of(sums);
  Floats last = broadcast_float(-HUGE_VALF);
  const size_t bytes = static_cast<size_t>(n - i) * sizeof(float);
  std::memcpy(&last, x + i, bytes);
  last = exp_of(last - most);
  std::memcpy(x + i, &last, bytes);
  return sum_of(sums + last);
}

inline void rotate_row(const float* x, const float* cos, const float* sin, int64_t half,
                       float* out) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Floats a = load_floats(x + i), b = load_floats(x + half + i);
    const Floats c = load_floats(cos + i), s = load_floats(sin + i);
    store_floats(out + i, a * c - b * s);
    store_floats(out + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    out[i] = a * cos[i] - b * sin[i];
    out[half + i] = b * cos[i] + a * sin[i];
  }
}

inline Floats swiglu_of(Floats gate, Floats up) {
  const Floats e = exp_of(gate < 0.0f ? gate : -gate);
  return (gate < 0.0f ? gate * e : gate) / (1.0f + e) * up;
}

inline void swiglu_row(const float* gate, const float* up, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store_floats(out + i, swiglu_of(load_floats(gate + i), load_floats(up + i)));
  }
  if (i == n) return;
  Floats last_gate{}, last_up{};
  const size_t bytes = static_cast<size_t>(n - i) * sizeof(float);
  std::memcpy(&last_gate, gate + i, bytes);
  std::memcpy(&last_up, up + i, bytes);
  const Floats last = swiglu_of(last_gate, last_up);
  std::memcpy(out + i, &last, bytes);
}

}  // namespace
}  // namespace edgelora::kernels
