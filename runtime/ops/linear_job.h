// One call of Linear, shared among the workers of a crew.
#pragma once

#include <atomic>

#include "kernels/kernels.h"
#include "ops/crew.h"
#include "ops/row_adapters.h"
#include "ops/scratch.h"
#include "ops/shares.h"

namespace edgelora::ops {

enum class Activation : uint8_t { kNone, kSwiGlu };

// What a node is, but for its weights.
struct LinearNode {
  const float* norm = nullptr;  // [K] weight of an RMS norm of x, or null
  float epsilon = 0.0f;         // of the norm
  const float* bias = nullptr;  // [N] or null
  Activation activation = Activation::kNone;
  // Where kernels can group scales of x, it is rounded to codes and to codes of what those miss:
  // makes up for what groups lose elsewhere.
  bool refined = false;
};

// Everything a call reads and writes; nothing is owned.
struct LinearCall {
  const kernels::KernelTable* kernels;
  const kernels::Weights* weights;
  LinearNode node;
  bool exact;  // float32 activations
  int64_t panels;
  const float* x;           // [rows, K]
  const float* residual;    // [rows, columns of y] or null; may be y, but not with kSwiGlu
  float* y;                 // [rows, N]; kSwiGlu: [rows, N / 2]
  int64_t rows;             // M
  int64_t sequence_length;  // row m belongs to sequence m / sequence_length
  const RowAdapters* adapters;
  int64_t threads;
};

// A ticket is a worker, who takes what is left of each step:
//   prepare   a group of rows of x → normed float32, int8 codes. A row alone is prepared by each
//             worker for itself: to hand it over would take longer
//   down      t = weight · A·x for a group of rows, all slices; of a row alone for one slice
//   panels    pieces of the panels of y, of a strip of the rows and then of the next: W·x; += B·t;
//             += bias; SwiGLU; += residual
// and waits between them for those who still work on theirs. All in one parallel section: a second
// one would cost a decode step more than the side branch itself.
class LinearJob {
 public:
  // Takes this thread's call scratch; throws std::bad_alloc.
  explicit LinearJob(const LinearCall& call);

  // Throws Error or std::bad_alloc.
  void run(Crews* crews);

  void operator()(int64_t ticket);  // what the crew calls

 private:
  // x as the kernels read it.
  struct Prepared {
    float* normed;  // [M, K], where normed_rows()
    int8_t* codes;  // [M · code_rows(), Kp]
    float* scales;  // [M · code_rows(), Kp/32]
    int32_t* sums;  // [M · code_rows(), Kp/32]
  };
  // The rows that a scratch holds rearranged, by their first one, and for what.
  struct Kept {
    int64_t row = -1;
    bool for_a = false;  // else for W
  };
  // What one thread has for itself.
  struct Worker {
    Prepared x;       // everybody's; of a row alone its own
    float* normed;    // [K] on the way to codes, where x has no normed rows
    void* linear;     // scratch of the kernel
    Kept kept;        // there
    float* products;  // [products_of_tile(), rows, columns] of a tile
    float* rest;      // refined(): [K] what a row's codes miss of it, and
    float* pairs;  // [2 · rows, columns] the products of a tile, of the codes and of what they miss
  };
  // Rows of one strip, and panels of W that are computed together.
  struct Tile {
    int64_t row_begin, row_end;
    int64_t panel_begin, panel_end;
  };
  // Row m of a tile, panel p lies at y + m · stride + 16p.
  struct Target {
    float* y;
    int64_t stride;  // floats
  };

  void plan();
  void take_scratch();
  bool take_worker(Worker* worker) const;
  Prepared place_prepared(Pieces& pieces) const;
  // Whether anything but the codes is made of normed rows.
  bool normed_rows() const {
    return call_.node.norm != nullptr && (call_.exact || call_.adapters->t_size() > 0);
  }
  // That wait for something else before they are y: gate and up, or what a residual is added to.
  int64_t products_of_tile() const {
    if (call_.node.activation == Activation::kSwiGlu) return 2;
    return call_.residual != nullptr ? 1 : 0;
  }
  bool can_group() const { return !call_.exact && call_.kernels->quantize_groups != nullptr; }
  bool groups_scales() const {
    return !call_.exact && kernels::groups_scales(*call_.kernels, weights_.format);
  }
  bool refined() const { return call_.node.refined && can_group(); }
  int64_t code_rows() const { return refined() ? 2 : 1; }  // of a row of x
  void prepare(int64_t ticket, const Worker& worker);
  void prepare_rows(const Worker& worker, int64_t begin, int64_t end) const;
  void round_row(const Worker& worker, const float* row, int64_t m) const;
  template <typename Body>
  void for_each_adapter(int64_t row_begin, int64_t row_end, Body body) const;
  void down(Worker& worker, int64_t item) const;
  void down_slice(Worker& worker, int64_t slice, int64_t row_begin, int64_t row_end) const;
  void down_branch(const Prepared& x, const Branch& branch, int64_t row_begin,
                   int64_t row_end) const;
  void down_packed(Worker& worker, const Branch& branch, int64_t row_begin, int64_t row_end) const;
  bool is_packed(const Branch& branch) const { return branch.packed != nullptr && !call_.exact; }
  float* t_of(const Branch& branch, int64_t row) const {
    return t_ + row * call_.adapters->t_size() + branch.offset;
  }
  Shares::Sizes piece_items() const;
  Tile first_tile(const Shares::Piece& items) const;
  void compute(Worker& worker, const Tile& tile) const;
  void swiglu_tile(Worker& worker, const Tile& tile) const;
  void residual_tile(Worker& worker, const Tile& tile) const;
  void product(Worker& worker, const Tile& tile, const Target& target) const;
  void refined_product(Worker& worker, const Tile& tile, const Target& target) const;
  void up(const Tile& tile, const Target& target) const;
  void up_slice(int64_t slice, int64_t slice_row, const Tile& tile, const Target& target) const;
  void change_rows(const RowChange& rows, int64_t out_features, const Tile& tile,
                   const Target& target) const;
  void up_branch(const Branch& branch, int64_t out_features, const Tile& tile,
                 const Target& target) const;
  void add_bias(const Tile& tile, const Target& target) const;
  void add_residual(const Tile& tile, const Target& from) const;
  Target y_of(const Tile& tile) const { return {call_.y + tile.row_begin * columns(), columns()}; }
  kernels::Activations quantized(Worker& worker, Kept wanted, int64_t row_end) const;
  kernels::Activations first_codes(Worker& worker, int64_t row) const;
  int64_t strip_begin(int64_t strip) const;
  int64_t tile_panels() const;
  int64_t columns() const;  // of y
  int64_t group_begin(int64_t group) const;
  const float* input_row(const Prepared& x, int64_t row) const;  // normed, if the node has a norm
  const NodeAdapter* of_row(int64_t row) const {
    return call_.adapters->of_sequence(row / call_.sequence_length);
  }

  const LinearCall call_;           // copies: what a helper reads first lies together,
  const kernels::Weights weights_;  // and was not pushed out of the caches since the last token
  int64_t workers_ = 1;
  int64_t row_groups_ = 1;
  int64_t strips_ = 1;
  int64_t target_panels_ = 0;  // of y
  int64_t item_panels_ = 1;    // of an item of shares_, which kernels take together
  int64_t strip_items_ = 1;    // items of a strip
  Prepared shared_{};          // of several rows
  float* t_ = nullptr;         // [M, t_size], of row_adapters.h
  Shares groups_;              // of rows, to prepare
  Stage prepared_;
  Stage downs_;    // row groups, or slices of a row alone
  Shares shares_;  // items of each strip
  std::atomic<bool> out_of_memory_{false};
};

}  // namespace edgelora::ops
