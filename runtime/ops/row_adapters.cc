#include "ops/row_adapters.h"

#include <algorithm>
#include <utility>

#include "kernels/half.h"
#include "src/error.h"

namespace edgelora::ops {
namespace {

Error not_loaded(int64_t handle) {
  return Error(EDGELORA_NOT_FOUND, "adapter handle " + std::to_string(handle) + " is not loaded");
}

void check_fit(const SideBranch& branch, const std::string& target, int64_t in_features,
               int64_t out_features) {
  if (branch.in_features == in_features && branch.out_features == out_features) return;
  throw Error(EDGELORA_INVALID_ARGUMENT,
              target + ": the adapter is for [" + std::to_string(branch.out_features) + ", " +
                  std::to_string(branch.in_features) + "], the model has [" +
                  std::to_string(out_features) + ", " + std::to_string(in_features) + "]");
}

// factors [N] += share · (the term's − 1): of a weighted sum, each term is a change of the base.
void add_row_factors(const WeightedBranch& term, int64_t rows, std::vector<float>* factors) {
  if (term.branch->row_factors == nullptr) return;
  if (factors->empty()) factors->assign(static_cast<size_t>(rows), 1.0f);
  for (int64_t n = 0; n < rows; ++n) {
    const float factor = kernels::load_f32(term.branch->row_factors, n);
    (*factors)[static_cast<size_t>(n)] += term.share * (factor - 1.0f);
  }
}

}  // namespace

AdapterCache::AdapterCache(std::vector<std::string> targets, std::vector<int64_t> slices,
                           int64_t in_features)
    : targets_(std::move(targets)), slices_(std::move(slices)), in_features_(in_features) {}

HeldAdapter AdapterCache::find(int64_t handle) {
  HeldAdapter held;
  held.node = cached(handle);
  if (held.node) held.source = held.node->source.lock();
  if (held.source) return held;
  held.source = AdapterStore::instance().resolve(handle);
  if (!held.source) throw not_loaded(handle);
  held.node = resolve(handle, held.source);
  const std::lock_guard<std::mutex> lock(mutex_);
  entries_[next_] = held.node;
  next_ = (next_ + 1) % kEntries;
  return held;
}

std::shared_ptr<const NodeAdapter> AdapterCache::cached(int64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& entry : entries_) {
    if (entry && entry->handle == handle) return entry;
  }
  return nullptr;
}

std::shared_ptr<const NodeAdapter> AdapterCache::resolve(
    int64_t handle, const std::shared_ptr<const ActiveAdapter>& source) const {
  auto node = std::make_shared<NodeAdapter>();
  node->handle = handle;
  node->source = source;
  std::vector<WeightedBranch> terms;
  for (size_t i = 0; i < targets_.size(); ++i) {
    terms.clear();
    AdapterStore::branches(*source, targets_[i], &terms);
    auto& slice = node->slices.emplace_back();
    auto& row_factors = node->row_factors.emplace_back();
    for (const WeightedBranch& term : terms) {
      check_fit(*term.branch, targets_[i], in_features_, slices_[i]);
      const PackedFactors* packed = term.branch->packed.get();
      slice.push_back({term.branch->factors, packed == nullptr ? nullptr : &packed->view(),
                       term.weight, node->t_size});
      add_row_factors(term, slices_[i], &row_factors);
      node->t_size += term.branch->factors.rank + 2;  // a scale, and an odd rank's surplus
    }
  }
  return node;
}

void RowAdapters::resolve(AdapterCache& cache, const int64_t* ids, int64_t count) {
  release();
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] == 0 && sequences_.empty()) continue;  // a batch of the base alone touches no memory
    sequences_.resize(static_cast<size_t>(count), nullptr);
    if (ids[i] == 0) continue;
    const NodeAdapter* node = hold(cache, ids[i]);
    if (node->t_size > 0) sequences_[static_cast<size_t>(i)] = node;
    t_size_ = std::max(t_size_, node->t_size);
  }
}

const NodeAdapter* RowAdapters::hold(AdapterCache& cache, int64_t id) {
  for (const HeldAdapter& held : held_) {
    if (held.node->handle == id) return held.node.get();
  }
  held_.push_back(cache.find(id));
  return held_.back().node.get();
}

void RowAdapters::release() {
  held_.clear();
  sequences_.clear();
  t_size_ = 0;
}

}  // namespace edgelora::ops
