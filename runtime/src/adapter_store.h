// The one process-wide registry: handles (int64, never reused) → adapters. Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels/kernels.h"
#include "src/error.h"
#include "src/packed_factors.h"
#include "src/prefix.h"

namespace edgelora {

// Every linear that an adapter may name → {K, N}.
using Targets = std::unordered_map<std::string, std::pair<int64_t, int64_t>>;

// One side branch on one target, ready for the kernels.
struct SideBranch {
  kernels::Factors factors;  // in the adapter's mapped file; rank 0: it has a bias alone
  std::shared_ptr<const PackedFactors> packed;  // the same in int8; null where they are not used
  int64_t in_features;   // K
  int64_t out_features;  // N
  float scaling;            // of the factors
  const void* row_factors;  // DoRA, (IA)³: float32 [N], unaligned, of each row of W·x; null: all 1
  const void* bias;         // float32 [N], unaligned; null: none
};

// What an adapter does to the outputs of one target beside its branches: y = factors ⊙ W·x + bias.
struct RowChange {
  std::vector<float> factors;  // [N], times W·x; empty: all 1
  std::vector<float> bias;     // [N]; empty: none
};

// A file's worth of side branches, immutable once loaded.
class AdapterFile;
class OnnxAdapter;  // the same of flavor ort

// What a handle stands for: a weighted sum of adapter files (one of them with weight 1 for a plain
// adapter), or one adapter of flavor ort.
struct ActiveAdapter {
  struct Term {
    std::shared_ptr<const AdapterFile> file;
    float weight;
  };
  std::vector<Term> terms;  // at least one, each file once, all of one base; none of flavor ort
  std::unordered_map<std::string, RowChange> rows;  // by target, of the whole sum
  std::shared_ptr<const OnnxAdapter> onnx_adapter;  // flavor ort, else null

  // Activated LoRA: it acts from where these tokens begin; empty: everywhere.
  std::vector<int32_t> invocation;
  std::shared_ptr<const ActiveAdapter> before;  // the terms that do not wait; null: the base
  int64_t before_handle = 0;                    // resolved as long as this lives

  // Of the base that it was made for.
  const std::string& base_fingerprint() const;

  // Null if nothing stands before the text. Keeps its file mapped.
  std::shared_ptr<const Prefix> prefix() const;
};

// The first digits of a fingerprint, for messages.
std::string shortened(const std::string& fingerprint);

// A side branch of a sum.
struct WeightedBranch {
  const SideBranch* branch;
  float weight;  // its adapter's, times scaling
};

// Of a handle that stands for no adapter, or for one that was unloaded.
Error not_loaded(int64_t handle);

class AdapterStore {
 public:
  static AdapterStore& instance();

  // Maps and checks an adapter.safetensors; throws Error. Every target's K and N must equal
  // `targets`, a prefix must have `shape`, base_fingerprint must equal the model's.
  int64_t load(const std::string& path, const std::string& base_fingerprint,
               const Targets& targets, const PrefixShape& shape);

  // A handle of an adapter of flavor ort.
  int64_t add(std::shared_ptr<const OnnxAdapter> adapter);

  // A new handle for Σ weight·adapter; the parts stay loaded as long as it lives. Throws Error,
  // also for a prefix, unless it is alone and has weight 1.
  int64_t compose(const int64_t* handles, const float* weights, int64_t count);

  // Drops the handle's reference; running computations finish with what they hold. Throws Error for
  // an unknown handle.
  void unload(int64_t handle);

  // Null for an unknown or unloaded handle. Handle 0 (base) has no entry here: callers test for it.
  // A session finds its adapter before each run and holds the result while it runs: then every
  // operator resolves it.
  std::shared_ptr<const ActiveAdapter> find(int64_t handle) const;

  // As find, but also an unloaded adapter that somebody still holds: what a running computation may
  // go on with.
  std::shared_ptr<const ActiveAdapter> resolve(int64_t handle) const;

  // Appends the branches of `adapter` on `target`, none of rank 0.
  static void branches(const ActiveAdapter& adapter, const std::string& target,
                       std::vector<WeightedBranch>* out);

 private:
  struct Impl;
  AdapterStore();
  ~AdapterStore();
  std::unique_ptr<Impl> impl_;
};

}  // namespace edgelora
