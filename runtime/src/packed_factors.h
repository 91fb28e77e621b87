// A factor pair rounded to int8, made when an adapter is loaded.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace edgelora {

class PackedFactors {
 public:
  // What it takes of memory, a multiple of 64 bytes.
  static int64_t bytes(int64_t rank, int64_t in_features, int64_t out_features);

  // Of ranks up to kMostPackedRank. memory: zeros, aligned to 64 bytes, must outlive this.
  PackedFactors(const kernels::Factors& factors, int64_t in_features, int64_t out_features,
                uint8_t* memory);
  PackedFactors(const PackedFactors&) = delete;
  PackedFactors& operator=(const PackedFactors&) = delete;

  const kernels::PackedFactors& view() const { return view_; }

  // The factors' product is that of `view` times this power of two.
  float unit() const { return unit_; }

 private:
  // Each returns the exponent of the power of two by which it multiplied its factor.
  int pack_a(const kernels::Factors& factors, int64_t in_features);
  int pack_b(const kernels::Factors& factors, int64_t panels);

  int8_t* a_codes_;     // [P, Kp/4, 64], P panels of the rank
  uint16_t* a_scales_;  // float16 [P, Kp/32, 16]
  uint8_t* b_;
  float unit_ = 1.0f;
  kernels::PackedFactors view_{};
};

}  // namespace edgelora
