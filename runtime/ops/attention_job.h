// One call of Attention, cut into tickets for the crew.
//
//   append   rotated keys and the values of the new positions enter the kv_cache; of a decoded
//            token, who attends to it appends it
//   attend   a tile of query rows of one group of heads against a range of positions: scores a
//            chunk at a time, a running softmax (flash attention, Dao et al. 2022), so memory does
//            not grow with the context. The query heads that share a key head are rows of one
//            product: it is read once.
//   combine  where a range was split among threads (decode of a long context), its parts are added
//            up
#pragma once

#include <atomic>

#include "kernels/kernels.h"
#include "ops/crew.h"
#include "ops/kv_layout.h"

namespace edgelora::ops {

// What a node is.
struct AttentionNode {
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;  // even
  int64_t window;    // positions that a query sees, itself included; −1: all
  float epsilon;     // of the head norms
  const float* cos;  // [positions, head_dim / 2]
  const float* sin;
  int64_t positions;    // rows of the tables
  const float* q_norm;  // [head_dim], an RMS norm of each head before it is rotated, or null
  const float* k_norm;
};

// Rows of q, k or v: row m of the call at data + m · stride.
struct HeadRows {
  const float* data;
  int64_t stride;  // floats
};

// Everything a call reads and writes; nothing is owned.
struct AttentionCall {
  const kernels::KernelTable* kernels;
  const AttentionNode* node;
  KvLayout layout{2, false};
  HeadRows q, k, v;
  float* y;  // [batch, sequence, heads · head_dim]
  int64_t batch;
  int64_t sequence;
  int64_t first_query;  // of each sequence: rows of y before it are not written
  const int64_t* past;  // [batch], positions that the kv_cache holds before the call
  uint8_t* keys;        // [batch, kv_heads, capacity, key_row_bytes]
  uint8_t* values;      // [batch, kv_heads, capacity, value_row_bytes]
  int64_t capacity;
  int64_t threads;
};

class AttentionJob {
 public:
  // Takes this thread's call scratch; throws std::bad_alloc.
  explicit AttentionJob(const AttentionCall& call);

  // Throws std::bad_alloc.
  void run(Crews* crews);

  void operator()(int64_t ticket);  // what the crew calls

 private:
  // Query rows of one sequence that share a key head, against positions begin … end.
  struct Part {
    int64_t sequence, kv_head;
    int64_t query_begin, query_end;
    int64_t begin, end;  // positions; begin is a multiple of 32
  };
  // The running softmax of each row: out / sum is its attention so far.
  struct Softmax {
    float* most;  // [rows] largest score
    float* sum;   // [rows]
    float* out;   // [rows, D]
  };
  struct Buffers;  // a ticket's own

  void plan_tickets();
  Part part_of(int64_t ticket) const;
  Softmax partial(int64_t ticket) const;
  void append(int64_t ticket);
  void append_row(int64_t sequence, int64_t kv_head, int64_t i);
  void prepare_head(const float* from, const float* norm, int64_t position, float* to) const;
  void attend(int64_t ticket);
  void load_queries(const Part& part, const Buffers& buffers) const;
  void score(const Part& part, int64_t begin, int64_t end, const Buffers& buffers) const;
  void soften(const Part& part, int64_t begin, int64_t end, const Buffers& buffers,
              const Softmax& softmax) const;
  void soften_row(float* scores, int64_t first, int64_t last, int64_t row,
                  const Softmax& softmax) const;
  void add_values(const Part& part, int64_t begin, int64_t end, const Buffers& buffers,
                  const Softmax& softmax) const;
  void finish(const Part& part, const Softmax& softmax) const;
  void combine(int64_t first_ticket) const;
  KeyRows keys(int64_t sequence, int64_t kv_head) const;
  ValueRows values(int64_t sequence, int64_t kv_head) const;
  int64_t rows_of(const Part& part) const { return (part.query_end - part.query_begin) * group_; }
  int64_t position_of(const Part& part, int64_t row) const {
    return call_.past[part.sequence] + part.query_begin + row / group_;
  }

  const AttentionCall& call_;
  const AttentionNode& node_;
  int64_t group_;  // query heads of a key head
  int64_t workers_ = 1;
  int64_t append_tickets_ = 0;
  int64_t tile_queries_ = 1;
  int64_t tiles_ = 1;        // of a sequence and key head
  int64_t splits_ = 1;       // of a tile
  int64_t split_step_ = 0;   // positions of a split, but for the last
  float* partials_ = nullptr;  // [tickets, rows of a tile, D + 2] when split
  Stage appended_;
  std::atomic<bool> out_of_memory_{false};
};

}  // namespace edgelora::ops
