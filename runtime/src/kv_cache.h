// Keys and values of one session, all layers: one reservation of address space whose pages become
// memory as positions are used.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/manifest.h"

namespace edgelora {

class KvCache {
 public:
  // Throws Error with EDGELORA_OUT_OF_MEMORY if the address space cannot be had.
  KvCache(const ManifestModel& model, int64_t context_length);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // Tensor i of 2·layers: the keys of layer i/2, or its values if i is odd. float32
  // [num_key_value_heads, context_length, head_dim]
  float* tensor(size_t i) const { return data_ + i * tensor_size_; }

 private:
  size_t tensor_size_;  // floats
  size_t bytes_;
  float* data_;
};

}  // namespace edgelora
