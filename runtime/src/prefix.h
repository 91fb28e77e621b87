// Keys and values that an adapter puts into the kv_cache before the text: those of `positions`
// tokens that were trained, or computed from trained ones, at positions 0 … positions − 1.
#pragma once

#include <cstdint>

#include "kernels/half.h"

namespace edgelora {

// Of a model's kv_cache.
struct PrefixShape {
  int64_t layers;
  int64_t heads;  // of keys and values
  int64_t head_dim;
};

struct Prefix {
  PrefixShape shape;
  int64_t positions;
  bool half;           // float16, else float32
  // [layers, heads, positions, head_dim], unaligned, as attention multiplies them
  const void* keys;
  const void* values;  // likewise

  // to [head_dim], of `from`, which is keys or values.
  void read(const void* from, int64_t layer, int64_t head, int64_t position, float* to) const {
    const int64_t row = (layer * shape.heads + head) * positions + position;
    for (int64_t i = 0; i < shape.head_dim; ++i) {
      const int64_t index = row * shape.head_dim + i;
      to[i] = half ? kernels::half_to_float(kernels::load_u16(from, index))
                   : kernels::load_f32(from, index);
    }
  }
};

}  // namespace edgelora
