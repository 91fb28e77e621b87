// A factor pair rounded to int8, made when an adapter is loaded.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace edgelora {

// Owns what `view` points into.
class PackedFactors {
 public:
  // Of ranks up to kMostPackedRank. Throws std::bad_alloc.
  PackedFactors(const kernels::Factors& factors, int64_t in_features, int64_t out_features);
  PackedFactors(const PackedFactors&) = delete;
  PackedFactors& operator=(const PackedFactors&) = delete;

  const kernels::PackedFactors& view() const { return view_; }

  // The factors' product is that of `view` times this power of two.
  float unit() const { return unit_; }

 private:
  // Each returns the exponent of the power of two by which it multiplied its factor.
  int pack_a(const kernels::Factors& factors, int64_t in_features);
  int pack_b(const kernels::Factors& factors, int64_t panels);

  std::vector<int8_t> a_codes_;     // [P, Kp/4, 64], P panels of the rank
  std::vector<uint16_t> a_scales_;  // float16 [P, Kp/32, 16]
  std::vector<uint8_t> b_;
  float unit_ = 1.0f;
  kernels::PackedFactors view_{};
};

}  // namespace edgelora
