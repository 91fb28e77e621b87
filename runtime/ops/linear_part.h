// One linear of a node: its constants, and its runs. Linear is one of them, Layer has four.
#pragma once

#include <string>
#include <vector>

#include "ops/linear_job.h"
#include "ops/operator.h"
#include "ops/packed_weights.h"

namespace edgelora::ops {

// What a run reads and writes; nothing is owned.
struct LinearRun {
  const float* x;         // [batch · sequence, K]
  const float* residual;  // as y, or null; may be y, but not with SwiGLU
  float* y;               // [batch · sequence, columns]
  int64_t batch;
  int64_t sequence;
  const int64_t* adapter_ids;  // [batch]
};

class LinearPart {
 public:
  // Inputs of a part, counted from its first; all are constants.
  enum Input : size_t { kCodes = 0, kBias = 5, kNorm = 6, kInputCount = 7 };

  // Throws Error.
  LinearPart(const Shared& shared, const NodeInfo& node);

  int64_t in_features() const { return packed_.weights().in_features; }
  int64_t columns() const;  // of y

  // Asks for what a run of one row reads first.
  void prefetch() const;

  // Throws Error or std::bad_alloc.
  void run(const LinearRun& run) const;

 private:
  std::vector<int64_t> slices() const;

  const Shared shared_;
  PackedWeights packed_;
  const LinearNode node_;
  mutable AdapterCache cache_;  // guards itself
};

}  // namespace edgelora::ops
