// How a kv_cache lies in memory: each head's keys are an int8 matrix that gains a row with every
// position, its values one that gains a column. So the kernels of Linear compute attention, on
// every ISA.
//
// One head, `capacity` positions (a multiple of 32), D = head_dim, Dk = D up to 32, Dv = D up to
// 16:
//   keys    codes int8 [capacity/16, Dk/4, 64]   panels of 16 positions, as int8 weights [capacity,
//           D] scales float16 [capacity/16, Dk/32, 16]
//   values  codes int8 [Dv/16, capacity/4, 64]   panels of 16 features, as int8 weights [D,
//           capacity]
//           scales float32 [capacity]            one a position, multiplied into the softmax
// Of a session with accuracy "float", both float32: keys [capacity/16, D, 16], values [Dv/16,
// capacity, 16]. A cache tensor is bytes [batch, num_key_value_heads, capacity, row_bytes];
// row_bytes tells the format.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace edgelora::ops {

inline constexpr int64_t kCapacityStep = 32;     // positions
inline constexpr int64_t kAttentionChunk = 256;  // positions whose scores are held at a time
inline constexpr int64_t kMostHeadDim = 512;

class KvLayout {
 public:
  KvLayout(int64_t head_dim, bool exact) : head_dim_(head_dim), exact_(exact) {}

  int64_t key_row_bytes() const { return exact_ ? 4 * head_dim_ : key_width() + key_width() / 16; }
  int64_t value_row_bytes() const { return exact_ ? 4 * value_width() : value_width() + 4; }
  static int64_t capacity_for(int64_t positions) {
    return (positions + kCapacityStep - 1) / kCapacityStep * kCapacityStep;
  }

  bool exact() const { return exact_; }
  int64_t head_dim() const { return head_dim_; }
  int64_t key_width() const { return (head_dim_ + 31) / 32 * 32; }
  int64_t value_width() const { return (head_dim_ + 15) / 16 * 16; }

 private:
  int64_t head_dim_;
  bool exact_;
};

// One head's keys or values in a cache of some capacity; nothing is owned.
class KeyRows {
 public:
  KeyRows(const KvLayout& layout, int64_t capacity, uint8_t* bytes)
      : layout_(layout), capacity_(capacity), bytes_(bytes) {}

  // key [D], rotated.
  void put(const kernels::KernelTable& kernels, int64_t position, const float* key);
  // The lines that `put` will write.
  void prefetch(int64_t position) const;
  // The first `positions` as W [positions, D].
  kernels::Weights weights(int64_t positions) const;
  // The first `positions` of a cache of another capacity.
  void copy_from(const KeyRows& other, int64_t positions);

 private:
  // Bytes of a row but for its scales.
  int64_t row_bytes() const {
    return layout_.exact() ? 4 * layout_.head_dim() : layout_.key_width();
  }
  // The first four bytes of a row; the next lie 64 bytes on.
  uint8_t* row(int64_t position) const {
    return bytes_ + position / 16 * 16 * row_bytes() + position % 16 * 4;
  }
  // Of features 32·block … of a position, float16.
  uint8_t* scale(int64_t position, int64_t block) const {
    const int64_t panel = position / 16 * (layout_.key_width() / 32) + block;
    return scales() + 2 * (panel * 16 + position % 16);
  }
  uint8_t* scales() const { return bytes_ + capacity_ * layout_.key_width(); }

  KvLayout layout_;
  int64_t capacity_;
  uint8_t* bytes_;
};

class ValueRows {
 public:
  ValueRows(const KvLayout& layout, int64_t capacity, uint8_t* bytes)
      : layout_(layout), capacity_(capacity), bytes_(bytes) {}

  void put(int64_t position, const float* value);
  // The lines that `put` will write.
  void prefetch(int64_t position) const;
  // Positions begin … end as W [D, end − begin], without the scales; begin is a multiple of 32.
  kernels::Weights weights(int64_t begin, int64_t end) const;
  // [capacity], unaligned; null where the values are float32.
  const float* scales() const;
  void copy_from(const ValueRows& other, int64_t positions);

 private:
  int64_t panel_bytes() const { return capacity_ * 16 * (layout_.exact() ? 4 : 1); }
  // Feature 16·panel of a position; the next lie 4 bytes on.
  uint8_t* column(int64_t position, int64_t panel) const {
    return bytes_ + panel * panel_bytes() +
           (layout_.exact() ? position * 64 : position / 4 * 64 + position % 4);
  }
  uint8_t* scale(int64_t position) const {  // float32
    return bytes_ + capacity_ * layout_.value_width() + 4 * position;
  }

  KvLayout layout_;
  int64_t capacity_;
  uint8_t* bytes_;
};

}  // namespace edgelora::ops
