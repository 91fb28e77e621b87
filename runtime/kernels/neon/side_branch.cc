// t[r] = weight · Σ_k a[r, k]·x[k]         a [rank, K]
// y[16p + i] += Σ_r b[p, r, i]·t[r]        b [panels, rank, 16]
//
// Factors come from a file as they lie there: float16 or float32, any alignment.
// down: eight registers of partial sums for one r: an in-order core waits four cycles for each sum.
// up: four, the 16 rows of a panel.
#include "kernels/half.h"
#include "kernels/neon/neon.h"
#include "kernels/neon/registers.h"
#include "kernels/panels.h"

namespace edgelora::kernels::neon {
namespace {

struct Half {
  static constexpr int64_t kBytes = 2;
  static float32x4_t load4(const char* from) { return load_half4(from); }
  static float load1(const char* from) { return half_to_float(load_u16(from, 0)); }
};

struct Float {
  static constexpr int64_t kBytes = 4;
  static float32x4_t load4(const char* from) { return load_float4(from); }
  static float load1(const char* from) { return load_f32(from, 0); }
};

float sum_of_eight(const float32x4_t sums[8]) {
  const float32x4_t even = vaddq_f32(vaddq_f32(sums[0], sums[2]), vaddq_f32(sums[4], sums[6]));
  const float32x4_t odd = vaddq_f32(vaddq_f32(sums[1], sums[3]), vaddq_f32(sums[5], sums[7]));
  return vaddvq_f32(vaddq_f32(even, odd));
}

template <class Value>
float dot(const char* a, const float* x, int64_t count) {
  float32x4_t sums[8];
  for (float32x4_t& sum : sums) sum = vdupq_n_f32(0.0f);
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const int64_t i = k + 4 * j;
      sums[j] = vfmaq_f32(sums[j], Value::load4(a + i * Value::kBytes), vld1q_f32(x + i));
    }
  }
  for (; k + 4 <= count; k += 4) {
    sums[0] = vfmaq_f32(sums[0], Value::load4(a + k * Value::kBytes), vld1q_f32(x + k));
  }
  float rest = 0.0f;
  for (; k < count; ++k) rest += Value::load1(a + k * Value::kBytes) * x[k];
  return sum_of_eight(sums) + rest;
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
  float32x4_t sums[4];
  for (float32x4_t& sum : sums) sum = vdupq_n_f32(0.0f);
  for (int64_t r = 0; r < rank; ++r) {
    const char* row = b + r * kPanelRows * Value::kBytes;
    for (int g = 0; g < 4; ++g) {
      sums[g] = vfmaq_n_f32(sums[g], Value::load4(row + 4 * g * Value::kBytes), t[r]);
    }
  }
  add_to(sums, rows, y);
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

}  // namespace edgelora::kernels::neon
