// One call of Linear, cut into tickets for the session's threads.
#pragma once

#include <atomic>

#include "kernels/kernels.h"
#include "ops/row_adapters.h"
#include "ops/tickets.h"

namespace edgelora::ops {

// Everything a call reads and writes; nothing is owned.
struct LinearCall {
  const kernels::KernelTable* kernels;
  const kernels::Weights* weights;
  bool exact;  // float32 activations
  int64_t panels;
  const float* bias;        // [N] or null
  const float* x;           // [rows, K]
  float* y;                 // [rows, N]
  int64_t rows;             // M
  int64_t sequence_length;  // row m belongs to sequence m / sequence_length
  const RowAdapters* adapters;
  int64_t threads;
};

// Tickets, in this order:
//   quantize   a group of rows of x → int8 codes
//   down       t = weight · A·x for one slice and a group of rows
//   panels     a range of panels of y for all rows: waits for quantize, W·x; waits for down, +=
//   B·t; += bias
// All in one parallel section: a second one would cost a decode step more than the side branch
// itself.
class LinearJob {
 public:
  // Takes this thread's call scratch; throws std::bad_alloc.
  explicit LinearJob(const LinearCall& call);

  // Throws Error or std::bad_alloc.
  void run(const OrtApi& api, const OrtKernelContext* context);

  void operator()(int64_t ticket);  // what run_tickets calls

 private:
  void plan_tickets();
  void take_scratch();
  void quantize_rows(int64_t begin, int64_t end);
  void down(int64_t slice, int64_t row_begin, int64_t row_end);
  void panels(int64_t begin, int64_t end);
  void up(int64_t begin, int64_t end);
  void up_slice(int64_t slice, int64_t slice_row, int64_t begin, int64_t end);
  void add_bias(int64_t begin, int64_t end);
  int64_t group_begin(int64_t group) const;
  const NodeAdapter* of_row(int64_t row) const {
    return call_.adapters->of_sequence(row / call_.sequence_length);
  }

  const LinearCall& call_;
  const kernels::Weights& weights_;
  int64_t workers_ = 1;
  int64_t row_groups_ = 1;
  int64_t quantize_tickets_ = 0;
  int64_t down_tickets_ = 0;
  int64_t panel_tickets_ = 1;
  int8_t* codes_ = nullptr;  // [M, Kp]
  float* scales_ = nullptr;  // [M, Kp/32]
  int32_t* sums_ = nullptr;  // [M, Kp/32]
  float* t_ = nullptr;       // [M, t_size]
  Stage quantized_;
  Stage downs_;
  std::atomic<bool> out_of_memory_{false};
};

}  // namespace edgelora::ops
