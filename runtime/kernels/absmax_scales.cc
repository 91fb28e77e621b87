#include <cmath>

#include "kernels/scratch.h"

namespace edgelora::kernels {
namespace {

float most(const float* values, int64_t count) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) largest = std::fmax(largest, std::fabs(values[i]));
  return largest;
}

int64_t groups_of(const Weights& weights) {
  int64_t groups = 0;
  for (int64_t i = 0; i < weights.slice_count; ++i) {
    groups +=
        ceil_div(ceil_div(weights.slices[i] * weights.in_features, kAbsmaxBlock), kAbsmaxGroup);
  }
  return groups;
}

// No absmax is greater.
float absmax_bound(const Weights& weights) {
  const int64_t groups = groups_of(weights);
  if (weights.absmax == nullptr) return most(weights.nested_absmax, groups * kAbsmaxGroup);
  return most(weights.absmax_table, 256) * most(weights.nested_absmax, groups) +
         most(weights.absmax_offset, weights.slice_count);
}

}  // namespace

int64_t absmax_panel_scales(const Weights& weights) { return scale_blocks(weights) * kPanelRows; }

float absmax_scale_unit(const Weights& weights) {
  const float bound = absmax_bound(weights);
  if (!std::isfinite(bound) || bound == 0.0f) return 1.0f;
  int exponent = 0;  // bound < 2^exponent
  std::frexp(bound, &exponent);
  // The least table scale is 120: scales are at most 2^22 / 120 < 65504, and normal down to
  // 2^-29 of that.
  return std::ldexp(1.0f, exponent < -100 ? -122 : exponent - 22);
}

}  // namespace edgelora::kernels
