// The one process-wide registry: handles (int64, never reused) → adapters. Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/kernels.h"

namespace edgelora {

// One side branch on one target, ready for the kernels; points into the adapter's mapped file.
struct SideBranch {
  kernels::Factors factors;
  int64_t in_features;   // K
  int64_t out_features;  // N
  float scaling;
};

// A file's worth of side branches, immutable once loaded.
class AdapterFile;

// What a handle stands for: a weighted sum of adapter files (one of them with weight 1 for a plain adapter).
struct ActiveAdapter {
  struct Term {
    std::shared_ptr<const AdapterFile> file;
    float weight;
  };
  std::vector<Term> terms;
};

// The side branches that act on one target, weight · scaling folded. Empty when the adapter leaves the target alone.
struct WeightedBranch {
  const SideBranch* branch;
  float weight;
};

class AdapterStore {
 public:
  static AdapterStore& instance();

  // Maps and checks an adapter.safetensors; throws Error. Every target's K and N must equal `targets` (name → {K, N}),
  // base_fingerprint must equal the model's.
  int64_t load(const std::string& path, const std::string& base_fingerprint,
               const std::unordered_map<std::string, std::pair<int64_t, int64_t>>& targets);

  // A new handle for Σ weight·adapter; the parts stay loaded as long as it lives.
  int64_t compose(const int64_t* handles, const float* weights, int64_t count);

  // Drops one reference held by the caller; running computations finish with what they hold.
  void unload(int64_t handle);

  // Null for an unknown or unloaded handle. Handle 0 (base) has no entry here: callers test for it.
  std::shared_ptr<const ActiveAdapter> find(int64_t handle) const;

  // Appends the branches of `adapter` on `target`.
  static void branches(const ActiveAdapter& adapter, const std::string& target, std::vector<WeightedBranch>* out);

 private:
  struct Impl;
  AdapterStore();
  std::unique_ptr<Impl> impl_;
};

}  // namespace edgelora
