// The constant inputs of Linear and Embedding as the kernels' Weights, every size checked.
#pragma once

#include <initializer_list>
#include <vector>

#include "kernels/kernels.h"
#include "ops/ort.h"

namespace edgelora::ops {

// Attributes and constants of one node. `weights` points into the session's initializers and into
// `slices`.
class PackedWeights {
 public:
  // Input `codes_index` is the codes, followed by the other weight inputs in the documented order.
  // Throws Error. slices: out_features of each target.
  PackedWeights(const NodeInfo& node, size_t codes_index, std::vector<int64_t> slices);
  PackedWeights(const PackedWeights&) = delete;
  PackedWeights& operator=(const PackedWeights&) = delete;

  // What `linear` of these kernels wants of nf4 and fp4, a quarter of a bit for each weight; of
  // other formats nothing. Gives the file's pages back: the exact path reads them again. Throws
  // std::bad_alloc.
  void unpack_absmax(const kernels::KernelTable& kernels);

  const kernels::Weights& weights() const { return weights_; }
  int64_t panels() const { return panels_; }

 private:
  void read_codes(const NodeInfo& node, size_t index);
  void read_scales(const NodeInfo& node, size_t index);
  void read_zero_points(const NodeInfo& node, size_t index);
  void read_exact_offsets(const Tensor& tensor);
  void read_absmax(const NodeInfo& node, size_t index);
  void give_back_absmax() const;
  void check_slices() const;
  void refuse_surplus(const NodeInfo& node, size_t index,
                      std::initializer_list<const char*> names) const;

  std::vector<int64_t> slices_;
  std::vector<uint16_t> offsets_;  // float16 of float32 ones
  std::vector<uint16_t> absmax_scales_;
  kernels::Weights weights_{};
  int64_t panels_ = 0;
  int64_t blocks_ = 0;  // of a row
  int64_t absmax_groups_ = 0;  // of all slices
};

}  // namespace edgelora::ops
