// One call of Linear, cut into tickets for the crew.
#pragma once

#include <atomic>

#include "kernels/kernels.h"
#include "ops/crew.h"
#include "ops/row_adapters.h"
#include "ops/shares.h"

namespace edgelora::ops {

enum class Activation : uint8_t { kNone, kSwiGlu };

// What a node is, but for its weights.
struct LinearNode {
  const float* norm = nullptr;  // [K] weight of an RMS norm of x, or null
  float epsilon = 0.0f;         // of the norm
  const float* bias = nullptr;  // [N] or null
  Activation activation = Activation::kNone;
};

// Everything a call reads and writes; nothing is owned.
struct LinearCall {
  const kernels::KernelTable* kernels;
  const kernels::Weights* weights;
  LinearNode node;
  bool exact;  // float32 activations
  int64_t panels;
  const float* x;           // [rows, K]
  const float* residual;    // [rows, columns of y] or null; not y, which the products overwrite
  float* y;                 // [rows, N]; kSwiGlu: [rows, N / 2]
  int64_t rows;             // M
  int64_t sequence_length;  // row m belongs to sequence m / sequence_length
  const RowAdapters* adapters;
  int64_t threads;
};

// Tickets, in this order:
//   prepare   a group of rows of x → normed float32, int8 codes
//   down      t = weight · A·x for one slice and a group of rows
//   panels    one for each worker: its share of the panels of y, piece by piece, for all rows, tile by tile:
//             waits for prepare, W·x; waits for down, += B·t; += bias; SwiGLU; += residual
// All in one parallel section: a second one would cost a decode step more than the side branch
// itself.
class LinearJob {
 public:
  // Takes this thread's call scratch; throws std::bad_alloc.
  explicit LinearJob(const LinearCall& call);

  // Throws Error or std::bad_alloc.
  void run(Crews* crews);

  void operator()(int64_t ticket);  // what the crew calls

 private:
  // Some rows, and panels of W that are computed together.
  struct Tile {
    int64_t row_begin, row_end;
    int64_t panel_begin, panel_end;
  };
  // Row m of a tile, panel p lies at y + m · stride + 16p.
  struct Target {
    float* y;
    int64_t stride;  // floats
  };

  void plan_tickets();
  void take_scratch();
  void prepare_rows(int64_t begin, int64_t end);
  void down(int64_t slice, int64_t row_begin, int64_t row_end);
  void down_branch(const Branch& branch, int64_t row_begin, int64_t row_end);
  void down_packed(const Branch& branch, int64_t row_begin, int64_t row_end);
  bool is_packed(const Branch& branch) const { return branch.packed != nullptr && !call_.exact; }
  float* t_of(const Branch& branch, int64_t row) const {
    return t_ + row * call_.adapters->t_size() + branch.offset;
  }
  int64_t piece_panels() const;
  void share_panels(int64_t worker);
  void panels(const Shares::Piece& piece, void* worker);
  void plain_tile(const Tile& tile, void* worker);
  void swiglu_tile(const Tile& tile, void* worker);
  void product(const Tile& tile, const Target& target, void* worker);
  void up(const Tile& tile, const Target& target);
  void up_slice(int64_t slice, int64_t slice_row, const Tile& tile, const Target& target);
  void add_bias(const Tile& tile, const Target& target);
  void add_residual(const Tile& tile);
  kernels::Activations quantized(int64_t row_begin, int64_t row_end) const;
  int64_t worker_bytes(int64_t panels) const;
  int64_t tile_rows() const;
  int64_t columns() const;  // of y
  int64_t group_begin(int64_t group) const;
  const float* input_row(int64_t row) const;  // normed, if the node has a norm
  const NodeAdapter* of_row(int64_t row) const {
    return call_.adapters->of_sequence(row / call_.sequence_length);
  }

  const LinearCall& call_;
  const kernels::Weights& weights_;
  int64_t workers_ = 1;
  int64_t row_groups_ = 1;
  int64_t prepare_tickets_ = 0;
  int64_t down_tickets_ = 0;
  int64_t target_panels_ = 0;  // of y
  float* normed_ = nullptr;    // [M, K]
  int8_t* codes_ = nullptr;    // [M, Kp]
  float* scales_ = nullptr;    // [M, Kp/32]
  int32_t* sums_ = nullptr;    // [M, Kp/32]
  float* t_ = nullptr;         // [M, t_size], of row_adapters.h
  Shares shares_;  // of the target panels
  Stage prepared_;
  Stage downs_;
  std::atomic<bool> out_of_memory_{false};
};

}  // namespace edgelora::ops
