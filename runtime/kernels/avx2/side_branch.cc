// t[r] = weight · Σ_k a[r, k]·x[k]         a [rank, K]
// y[16p + i] += Σ_r b[p, r, i]·t[r]        b [panels, rank, 16]
//
// Factors come from a file as they lie there: float16 or float32, any alignment.
// down: four registers of partial sums for one r.  up: two, the 16 rows of a panel.
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/registers.h"
#include "kernels/half.h"
#include "kernels/panels.h"

namespace edgelora::kernels::avx2 {
namespace {

struct Half {
  static constexpr int64_t kBytes = 2;
  static __m256 load8(const char* from) { return load_half8(from); }
  static float load1(const char* from) { return half_to_float(load_u16(from, 0)); }
};

struct Float {
  static constexpr int64_t kBytes = 4;
  static __m256 load8(const char* from) { return load_float8(from); }
  static float load1(const char* from) { return load_f32(from, 0); }
};

template <class Value>
float dot(const char* a, const float* x, int64_t count) {
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                    _mm256_setzero_ps()};
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t i = k + 8 * j;
      sums[j] = fma(Value::load8(a + i * Value::kBytes), _mm256_loadu_ps(x + i), sums[j]);
    }
  }
  for (; k + 8 <= count; k += 8) {
    sums[0] = fma(Value::load8(a + k * Value::kBytes), _mm256_loadu_ps(x + k), sums[0]);
  }
  float rest = 0.0f;
  for (; k < count; ++k) rest += Value::load1(a + k * Value::kBytes) * x[k];
  const __m256 sum =
      _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
  return sum_lanes(sum) + rest;
}

template <class Value>
void down(const Factors& factors, int64_t in_features, float weight, const float* x, float* t) {
  const char* a = static_cast<const char*>(factors.a);
  for (int64_t r = 0; r < factors.rank; ++r) {
    t[r] = weight * dot<Value>(a + r * in_features * Value::kBytes, x, in_features);
  }
}

// y [rows ≤ 16] += b [rank, 16] · t
template <class Value>
void add_panel(const char* b, int64_t rank, const float* t, int64_t rows, float* y) {
  __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0;
  for (int64_t r = 0; r < rank; ++r) {
    const char* row = b + r * kPanelRows * Value::kBytes;
    const __m256 tr = _mm256_set1_ps(t[r]);
    sum0 = fma(Value::load8(row), tr, sum0);
    sum1 = fma(Value::load8(row + 8 * Value::kBytes), tr, sum1);
  }
  if (rows == kPanelRows) {
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), sum0));
    _mm256_storeu_ps(y + 8, _mm256_add_ps(_mm256_loadu_ps(y + 8), sum1));
    return;
  }
  alignas(32) float sums[kPanelRows];
  _mm256_store_ps(sums, sum0);
  _mm256_store_ps(sums + 8, sum1);
  for (int64_t i = 0; i < rows; ++i) y[i] += sums[i];
}

template <class Value>
void up(const Factors& factors, int64_t out_features, const float* t, int64_t panel_begin,
        int64_t panel_end, float* y) {
  const char* b = static_cast<const char*>(factors.b);
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const int64_t rows = min_of(kPanelRows, out_features - p * kPanelRows);
    add_panel<Value>(b + p * factors.rank * kPanelRows * Value::kBytes, factors.rank, t, rows,
                     y + p * kPanelRows);
  }
}

}  // namespace

void side_branch_down(const Factors& factors, int64_t in_features, float weight, const float* x,
                      float* t) {
  factors.half ? down<Half>(factors, in_features, weight, x, t)
               : down<Float>(factors, in_features, weight, x, t);
}

void side_branch_up(const Factors& factors, int64_t out_features, const float* t,
                    int64_t panel_begin, int64_t panel_end, float* y) {
  factors.half ? up<Half>(factors, out_features, t, panel_begin, panel_end, y)
               : up<Float>(factors, out_features, t, panel_begin, panel_end, y);
}

}  // namespace edgelora::kernels::avx2
