#include "ops/row_adapters.h"

#include <algorithm>
#include <utility>

#include "kernels/ceil_div.h"
#include "src/error.h"

namespace edgelora::ops {
namespace {

void check_fit(const SideBranch& branch, const std::string& target, int64_t in_features,
               int64_t out_features) {
  if (branch.in_features == in_features && branch.out_features == out_features) return;
  throw Error(EDGELORA_INVALID_ARGUMENT,
              target + ": the adapter is for [" + std::to_string(branch.out_features) + ", " +
                  std::to_string(branch.in_features) + "], the model has [" +
                  std::to_string(out_features) + ", " + std::to_string(in_features) + "]");
}

void check_rows(const RowChange& rows, const std::string& target, int64_t out_features) {
  for (const std::vector<float>* values : {&rows.factors, &rows.bias}) {
    if (values->empty() || static_cast<int64_t>(values->size()) == out_features) continue;
    throw Error(EDGELORA_INVALID_ARGUMENT,
                target + ": the adapter is for " + std::to_string(values->size()) +
                    " rows, the model has " + std::to_string(out_features));
  }
}

// Null if there is none.
const RowChange* rows_of(const ActiveAdapter& adapter, const std::string& target) {
  const auto found = adapter.rows.find(target);
  return found == adapter.rows.end() ? nullptr : &found->second;
}

constexpr int64_t kBesideCodes = kernels::PackedT::kBesideCodes;
constexpr int64_t kLine = 16;  // floats: slices that threads write at once share no line of a cache

int64_t in_lines(int64_t floats) { return kernels::ceil_div(floats, kLine) * kLine; }

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
    node->rows.push_back(rows_of(*source, targets_[i]));
    if (node->rows.back() != nullptr) {
      check_rows(*node->rows.back(), targets_[i], slices_[i]);
      node->t_size = std::max(node->t_size, in_lines(kBesideCodes));  // a bias may be all there is
    }
    for (const WeightedBranch& term : terms) {
      check_fit(*term.branch, targets_[i], in_features_, slices_[i]);
      const PackedFactors* packed = term.branch->packed.get();
      slice.push_back({term.branch->factors, packed == nullptr ? nullptr : &packed->view(),
                       term.weight, packed == nullptr ? 0.0f : term.weight * packed->unit(),
                       node->t_size});
      node->t_size += in_lines(term.branch->factors.rank + kBesideCodes);
    }
  }
  return node;
}

void RowAdapters::resolve(AdapterCache& cache, const int64_t* ids, int64_t count) {
  release();
  try {
    fill(cache, ids, count);
  } catch (...) {
    release();  // what is half resolved keeps no adapter in memory
    throw;
  }
}

void RowAdapters::fill(AdapterCache& cache, const int64_t* ids, int64_t count) {
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
