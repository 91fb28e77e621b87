// Which side branches each sequence of a batch adds to one Linear.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "src/adapter_store.h"

namespace edgelora::ops {

// One term on one slice; its t lies at `offset` (floats) of the row's t: float32 [rank], or where
// int8 factors are used a float32 scale and int8 [4·⌈rank/4⌉] behind it.
struct Branch {
  kernels::Factors factors;
  const kernels::PackedFactors* packed;  // or null; the adapter holds it
  float weight;         // of factors
  float packed_weight;  // of packed
  int64_t offset;
};

// What one adapter adds to one Linear.
struct NodeAdapter {
  int64_t handle = 0;
  std::weak_ptr<const ActiveAdapter> source;  // weak: an unloaded adapter's memory must go
  std::vector<std::vector<Branch>> slices;    // of each slice, its terms
  std::vector<const RowChange*> rows;         // of each slice, or null; `source` owns it
  int64_t t_size = 0;                         // floats of a row's t; 0: this Linear is left alone
};

// A NodeAdapter and what keeps the memory it points into.
struct HeldAdapter {
  std::shared_ptr<const ActiveAdapter> source;
  std::shared_ptr<const NodeAdapter> node;
};

// Resolves handles for one Linear and remembers the latest, since every token asks for the same.
// Thread-safe.
class AdapterCache {
 public:
  // targets[i] has slices[i] rows; K = in_features.
  AdapterCache(std::vector<std::string> targets, std::vector<int64_t> slices, int64_t in_features);

  // Throws Error if the handle is not loaded or a branch does not fit.
  HeldAdapter find(int64_t handle);

 private:
  std::shared_ptr<const NodeAdapter> cached(int64_t handle);
  std::shared_ptr<const NodeAdapter> resolve(
      int64_t handle, const std::shared_ptr<const ActiveAdapter>& source) const;

  static constexpr size_t kEntries = 8;
  const std::vector<std::string> targets_;
  const std::vector<int64_t> slices_;
  const int64_t in_features_;
  std::mutex mutex_;  // guards what follows
  std::array<std::shared_ptr<const NodeAdapter>, kEntries> entries_;
  size_t next_ = 0;
};

// The adapters of one call, held while it runs.
class RowAdapters {
 public:
  // ids [count], one for each sequence. Throws Error, and is empty then.
  void resolve(AdapterCache& cache, const int64_t* ids, int64_t count);

  // Null for the base and for an adapter that leaves this Linear alone.
  const NodeAdapter* of_sequence(int64_t sequence) const {
    return t_size_ == 0 ? nullptr : sequences_[static_cast<size_t>(sequence)];
  }

  // Floats of a row's t, enough for each sequence; 0: no side branch in this call.
  int64_t t_size() const { return t_size_; }

  // Drops the adapters, keeps the memory for the next call.
  void release();

 private:
  void fill(AdapterCache& cache, const int64_t* ids, int64_t count);
  const NodeAdapter* hold(AdapterCache& cache, int64_t id);

  std::vector<HeldAdapter> held_;              // each distinct adapter once
  std::vector<const NodeAdapter*> sequences_;  // filled only from the first adapter on
  int64_t t_size_ = 0;
};

}  // namespace edgelora::ops
