// Attention of a node: its constants, its kv_cache, and its runs. Attention is one, Layer has one.
#pragma once

#include <vector>

#include "ops/attention_job.h"
#include "ops/operator.h"

namespace edgelora::ops {

// What a run reads and writes beside the kv_cache; nothing is owned.
struct AttentionRun {
  HeadRows q, k, v;
  float* y;  // [batch · sequence, heads · head_dim]
  int64_t batch;
  int64_t sequence;
  int64_t first_query = 0;  // rows of y before it, in each sequence, are not written
};

class AttentionPart {
 public:
  // Inputs of a part, counted from its first.
  enum Input : size_t {
    kPastKey = 0,
    kPastValue,
    kLastPosition,  // int32 [batch]
    kCos,           // from here on constants
    kSin,
    kQueryNorm,
    kKeyNorm,
    kInputCount,
  };
  enum Output : size_t { kPresentKey = 1, kPresentValue = 2 };

  // first: index of kPastKey. Throws Error.
  AttentionPart(const Shared& shared, const NodeInfo& node, size_t first);

  int64_t q_width() const { return node_.heads * node_.head_dim; }
  int64_t kv_width() const { return node_.kv_heads * node_.head_dim; }

  // q ‖ k ‖ v in rows of x.
  AttentionRun packed_run(const float* x, float* y, int64_t batch, int64_t sequence) const;

  // past and present of the keys or of the values.
  struct Cache {
    Tensor past;
    Shape shape;  // of present
    uint8_t* present;
  };
  // The kv_cache of one call: present holds what past does, and has room for the new positions.
  struct Caches {
    Cache keys, values;
    const std::vector<int64_t>* past;  // [batch], positions; this thread's, until its next call
  };

  // Throws Error.
  Caches open(OrtKernelContext* context, int64_t batch, int64_t sequence) const;

  // Throws std::bad_alloc.
  void run(const Caches& caches, const AttentionRun& run) const;

 private:
  struct Room {  // that a call needs
    int64_t batch;
    int64_t past;      // positions, of the longest sequence
    int64_t capacity;  // with the new ones
  };

  const std::vector<int64_t>& read_past(const OrtKernelContext* context, int64_t batch,
                                        int64_t sequence) const;
  Cache cache(OrtKernelContext* context, const Room& room, size_t input, size_t output,
              int64_t row_bytes) const;
  template <class Rows>
  void copy_heads(const Cache& cache, int64_t row_bytes, const std::vector<int64_t>& past) const;
  void prefetch_rows(const Caches& caches) const;

  const Shared shared_;
  const size_t first_;
  const AttentionNode node_;
  const KvLayout layout_;
};

}  // namespace edgelora::ops
