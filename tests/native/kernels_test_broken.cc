// Tests of the tests: the scalar kernels, each broken on purpose in one way, must fail their
// family.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels_test.h"
#include "kernels_test_check.h"
#include "sample.h"

namespace edgelora::kernels::test {
namespace {

using Families = void (*)(const std::vector<TestedIsa>& isas);

struct Mutant {
  const char* what;
  void (*break_one)(KernelTable* table);
  Families family;
};

const KernelTable& good() { return *select_kernels(0, "scalar"); }

float nudged(float value) { return value + std::fabs(value) * 0x1p-10f + 0x1p-30f; }

// linear with x changed by one code at the end of the last row.
void linear_off_by_one(const Weights& weights, const Activations& x, int64_t begin, int64_t end,
                       float* y, int64_t y_stride, void* scratch) {
  const int64_t padded = (weights.in_features + 31) / 32 * 32;
  std::vector<int8_t> codes(x.codes, x.codes + x.rows * padded);
  codes[static_cast<size_t>((x.rows - 1) * padded + weights.in_features - 1)] ^= 1;
  const Activations changed{x.rows, codes.data(), x.scales, x.sums};
  good().linear(weights, changed, begin, end, y, y_stride, scratch);
}

void linear_without_last_panel(const Weights& weights, const Activations& x, int64_t begin,
                               int64_t end, float* y, int64_t y_stride, void* scratch) {
  good().linear(weights, x, begin, std::max(begin, end - 1), y, y_stride, scratch);
}

void linear_beyond_last_row(const Weights& weights, const Activations& x, int64_t begin,
                            int64_t end, float* y, int64_t y_stride, void* scratch) {
  good().linear(weights, x, begin, end, y, y_stride, scratch);
  if (x.rows > 1) y[weights.out_features] = 0.0f;
}

// Rows in groups of 12, of which the last one takes the scales of the first.
void linear_wrong_scale_of_row_12(const Weights& weights, const Activations& x, int64_t begin,
                                  int64_t end, float* y, int64_t y_stride, void* scratch) {
  const int64_t blocks = (weights.in_features + 31) / 32;
  std::vector<float> scales(x.scales, x.scales + x.rows * blocks);
  if (x.rows == 12) std::copy_n(x.scales, blocks, scales.end() - blocks);
  const Activations changed{x.rows, x.codes, scales.data(), x.sums};
  good().linear(weights, changed, begin, end, y, y_stride, scratch);
}

void linear_scales_one_row_late(const Weights& weights, const Activations& x, int64_t begin,
                                int64_t end, float* y, int64_t y_stride, void* scratch) {
  Weights one = weights;
  one.scales = weights.scales + (weights.format == Format::kInt8 ? 1 : 0);
  good().linear(one, x, begin, end, y, y_stride, scratch);
}

// Of one format's zeros or offsets nothing is seen.
template <Format kFormat>
void linear_without_sums(const Weights& weights, const Activations& x, int64_t begin, int64_t end,
                         float* y, int64_t y_stride, void* scratch) {
  const std::vector<int32_t> none(
      static_cast<size_t>(x.rows * ((weights.in_features + 31) / 32)));
  const int32_t* sums = weights.format == kFormat ? none.data() : x.sums;
  good().linear(weights, {x.rows, x.codes, x.scales, sums}, begin, end, y, y_stride, scratch);
}

void linear_float_nudged(const Weights& weights, const float* x, int64_t rows, int64_t begin,
                         int64_t end, float* y, int64_t y_stride, void* scratch) {
  good().linear_float(weights, x, rows, begin, end, y, y_stride, scratch);
  float* last = y + (rows - 1) * y_stride + 16 * begin;
  if (begin < end) *last = nudged(*last);
}

void unpack_truncating(const Weights& weights, int64_t panel, uint16_t* scales, void* scratch) {
  good().unpack_absmax(weights, panel, scales, scratch);
  scales[absmax_panel_scales(weights) - 1] ^= 1;
}

void half_away_from_zero(const float* x, int64_t n, int8_t* codes, float* scales, int32_t* sums) {
  good().quantize_activations(x, n, codes, scales, sums);
  for (int64_t i = 0; i < n; ++i) {
    const float scale = scales[i / 32];
    const float code = scale > 0 ? x[i] / scale : 0.0f;
    if (std::fabs(code) - std::floor(std::fabs(code)) == 0.5f) {
      codes[i] = static_cast<int8_t>(std::round(code));
    }
  }
}

void down_without_weight(const Factors& factors, int64_t n, float, const float* x, float* t) {
  good().side_branch_down(factors, n, 1.0f, x, t);
}

void up_without_last_rank(const Factors& factors, int64_t n, const float* t, int64_t begin,
                          int64_t end, float* y) {
  std::vector<float> some(t, t + factors.rank);
  some.back() = 0.0f;
  good().side_branch_up(factors, n, some.data(), begin, end, y);
}

void up_int8_first_row_alone(const PackedFactors& factors, int64_t n, const PackedT& t,
                             int64_t begin, int64_t end, float* y, int64_t y_stride) {
  good().side_branch_up_int8(factors, n, {1, t.data, t.stride}, begin, end, y, y_stride);
}

// Where b is unsigned, sums that start at 0 are 128·Σt too large.
void up_int8_without_start(const PackedFactors& factors, int64_t n, const PackedT& t,
                           int64_t begin, int64_t end, float* y, int64_t y_stride) {
  good().side_branch_up_int8(factors, n, t, begin, end, y, y_stride);
  for (int64_t m = 0; m < t.rows; ++m) {
    int32_t start;
    std::memcpy(&start, t.data + m * t.stride + 1, sizeof start);
    y[m * y_stride + begin * kPanelRows] -= t.data[m * t.stride] * static_cast<float>(start);
  }
}

void up_int8_without_last_panel(const PackedFactors& factors, int64_t n, const PackedT& t,
                                int64_t begin, int64_t end, float* y, int64_t y_stride) {
  good().side_branch_up_int8(factors, n, t, begin, std::max(begin, end - 1), y, y_stride);
}

void row_without_last_value(const Weights& weights, int64_t row, float* out) {
  good().dequantize_row(weights, row, out);
  out[weights.in_features - 1] = 0.5f;
}

void swiglu_of_sigmoid(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = up[i] / (1.0f + std::exp(-gate[i]));
}

void norm_without_epsilon(const float* x, const float* weight, int64_t n, float, float* out) {
  good().rms_norm(x, weight, n, 0.0f, out);
}

float largest_of_all_but_last(const float* x, int64_t n) {
  return good().largest(x, std::max<int64_t>(0, n - 1));
}

float sum_of_all_but_last(float* x, int64_t n, float most) {
  return good().exp_minus(x, n, most) - x[n - 1];
}

void rotate_backwards(const float* x, const float* cos, const float* sin, int64_t half,
                      float* out) {
  std::vector<float> negative(sin, sin + half);
  for (float& value : negative) value = -value;
  good().rotate(x, cos, negative.data(), half, out);
}

constexpr Mutant kMutants[] = {
    {"a code of x off by one", [](KernelTable* t) { t->linear = linear_off_by_one; }, test_linear},
    {"the last panel not computed", [](KernelTable* t) { t->linear = linear_without_last_panel; },
     test_linear_panel_ranges},
    {"y written beyond N", [](KernelTable* t) { t->linear = linear_beyond_last_row; }, test_linear},
    {"a wrong scale where M is 12",
     [](KernelTable* t) { t->linear = linear_wrong_scale_of_row_12; }, test_linear},
    {"int8's scales one row late", [](KernelTable* t) { t->linear = linear_scales_one_row_late; },
     test_linear_zero},
    {"nf4's zero ignored",
     [](KernelTable* t) { t->linear = linear_without_sums<Format::kNf4>; }, test_linear},
    {"zero points ignored",
     [](KernelTable* t) { t->linear = linear_without_sums<Format::kInt4ZeroPoints>; }, test_linear},
    {"offsets ignored",
     [](KernelTable* t) { t->linear = linear_without_sums<Format::kInt4Offsets>; }, test_linear},
    {"linear_float off by 2^-10", [](KernelTable* t) { t->linear_float = linear_float_nudged; },
     test_linear_float},
    {"an nf4 scale's last bit", [](KernelTable* t) { t->unpack_absmax = unpack_truncating; },
     test_unpack_absmax},
    {"half away from zero", [](KernelTable* t) { t->quantize_activations = half_away_from_zero; },
     test_quantize_activations},
    {"a group's scales as if alone",
     [](KernelTable* t) { t->quantize_groups = good().quantize_activations; },
     test_quantize_activations},
    {"adapter weight ignored", [](KernelTable* t) { t->side_branch_down = down_without_weight; },
     test_side_branch},
    {"the last rank ignored", [](KernelTable* t) { t->side_branch_up = up_without_last_rank; },
     test_side_branch},
    {"rows ignored", [](KernelTable* t) { t->side_branch_up_int8 = up_int8_first_row_alone; },
     test_packed_factors},
    {"where sums start ignored",
     [](KernelTable* t) { t->side_branch_up_int8 = up_int8_without_start; }, test_packed_factors},
    {"the last panel of b ignored",
     [](KernelTable* t) { t->side_branch_up_int8 = up_int8_without_last_panel; },
     test_packed_factors},
    {"a wrong last value", [](KernelTable* t) { t->dequantize_row = row_without_last_value; },
     test_dequantize_row},
    {"sigmoid for SiLU", [](KernelTable* t) { t->swiglu = swiglu_of_sigmoid; }, test_swiglu},
    {"no epsilon", [](KernelTable* t) { t->rms_norm = norm_without_epsilon; }, test_rms_norm},
    {"the last value not seen", [](KernelTable* t) { t->largest = largest_of_all_but_last; },
     test_largest},
    {"a sum too small", [](KernelTable* t) { t->exp_minus = sum_of_all_but_last; },
     test_exp_minus},
    {"the wrong way round", [](KernelTable* t) { t->rotate = rotate_backwards; }, test_rotate},
};

// Whether the family notices; its complaints are neither printed nor counted.
bool noticed(const Mutant& mutant) {
  KernelTable table = good();
  mutant.break_one(&table);
  const Counts before = counts();
  counts() = {0, 0, true};
  mutant.family({{"broken", &table, Arithmetic::kBytes}});
  const bool failed = counts().failed > 0;
  counts() = before;
  return failed;
}

}  // namespace

// A sample of the shapes suffices; nothing is done where the kernels are tested with one.
void test_broken(const std::vector<TestedIsa>&) {
  size_t& one_in = edgelora::test::one_case_in();
  if (one_in > 1) return;
  one_in = 7;
  for (const Mutant& mutant : kMutants) {
    KERNELS_CHECK(noticed(mutant), "no test fails with a kernel broken on purpose: %s",
                  mutant.what);
  }
  one_in = 1;
}

}  // namespace edgelora::kernels::test
