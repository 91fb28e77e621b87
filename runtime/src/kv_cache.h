// Keys and values of one session, all layers: one reservation of address space whose pages become
// memory as positions are used.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"
#include "src/manifest.h"
#include "src/onnxruntime_library.h"
#include "src/prefix.h"

namespace edgelora {

// What a graph keeps of a position, in a head.
struct KvFormat {
  // float32 [head_dim], as GroupQueryAttention has it, or bytes in the layout of ops/kv_layout.h.
  static KvFormat floats(const ManifestModel& model);
  static KvFormat bytes(const ManifestModel& model, bool exact);

  // Of a position in all layers, bytes.
  int64_t position_bytes(const ManifestModel& model) const;

  ONNXTensorElementDataType type;
  int64_t element_bytes;
  int64_t key_width;    // elements
  int64_t value_width;  // elements
  int64_t step;         // a cache's positions are a multiple of it
  bool exact;           // of bytes: float32
};

class KvCache {
 public:
  // Throws Error with EDGELORA_OUT_OF_MEMORY if the address space cannot be had.
  KvCache(const ManifestModel& model, const KvFormat& format, int64_t context_length);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // Tensor i of 2·layers: the keys of layer i/2, or its values if i is odd.
  // [1, num_key_value_heads, capacity, key_width or value_width]
  OrtHandle<OrtValue> tensor(const OnnxRuntime& ort, size_t i) const;

  // Its first positions, of a prefix that has the model's shape and no more positions than this.
  void put(const Prefix& prefix);

 private:
  // One head's keys and values of a position, for the cache's format.
  struct Row {
    int64_t layer;
    int64_t head;
    int64_t position;
    const float* key;    // [head_dim]
    const float* value;  // [head_dim]
  };

  char* tensor_data(size_t i) const;
  void put_floats(const Row& row);
  void put_bytes(const Row& row, const kernels::KernelTable& kernels);

  int64_t width(size_t i) const { return i % 2 == 0 ? format_.key_width : format_.value_width; }

  KvFormat format_;
  int64_t heads_;
  int64_t head_dim_;
  int64_t capacity_;  // positions
  size_t bytes_;
  char* data_;
};

}  // namespace edgelora
