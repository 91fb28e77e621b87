#include "src/adapter_store.h"

#include <cmath>
#include <mutex>

#include "kernels/half.h"
#include "src/adapter_file.h"
#include "src/error.h"
#include "src/onnx_adapter.h"

namespace edgelora {
namespace {

using Adapter = std::shared_ptr<const ActiveAdapter>;

void add_term(const ActiveAdapter::Term& term, float weight, ActiveAdapter* sum) {
  if (!sum->terms.empty() &&
      term.file->base_fingerprint() != sum->terms.front().file->base_fingerprint()) {
    throw Error(EDGELORA_INVALID_ARGUMENT,
                "adapters of different bases cannot be composed: " +
                    shortened(sum->terms.front().file->base_fingerprint()) + " and " +
                    shortened(term.file->base_fingerprint()));
  }
  for (ActiveAdapter::Term& present : sum->terms) {
    if (present.file != term.file) continue;
    present.weight += weight;
    return;
  }
  sum->terms.push_back({term.file, weight});
}

// ONNX Runtime adds no deltas, and prefixes have no sum: the only one is the adapter itself.
Adapter sole(const Adapter& part, float weight, int64_t count) {
  if (count == 1 && weight == 1.0F) return std::make_shared<const ActiveAdapter>(*part);
  throw Error(
      EDGELORA_INVALID_ARGUMENT,
      part->onnx_adapter
          ? "flavor ort takes one adapter at a time with weight 1"
          : "an adapter that is a prefix of the text cannot be weighted or added to others: "
            "name it alone with weight 1");
}

void check_finite(float value, const std::string& what) {
  if (std::isfinite(value)) return;
  throw Error(EDGELORA_INVALID_ARGUMENT, what + " is not a finite number: choose smaller weights");
}

// to [N] += weight · (values − neutral), each value of which changes nothing where it is neutral.
void add_rows(const void* values, float neutral, float weight, int64_t count,
              std::vector<float>* to) {
  if (values == nullptr) return;
  if (to->empty()) to->assign(static_cast<size_t>(count), neutral);
  for (int64_t n = 0; n < count; ++n) {
    float& sum = (*to)[static_cast<size_t>(n)];
    const float value = kernels::load_f32(values, n);
    sum = weight == 1.0F && sum == neutral ? value : sum + weight * (value - neutral);
  }
}

void add_branch(const std::string& target, const SideBranch& branch, float weight,
                ActiveAdapter* sum) {
  check_finite(weight * branch.scaling, target + ": the weight of an adapter times its scaling");
  if (branch.row_factors == nullptr && branch.bias == nullptr) return;
  RowChange& rows = sum->rows[target];
  add_rows(branch.row_factors, 1.0F, weight, branch.out_features, &rows.factors);
  add_rows(branch.bias, 0.0F, weight, branch.out_features, &rows.bias);
}

// Of the terms that wait for tokens: the graph has one adapter at a time, so they wait for the
// same.
std::vector<int32_t> common_invocation(const std::vector<ActiveAdapter::Term>& terms) {
  std::vector<int32_t> common;
  for (const ActiveAdapter::Term& term : terms) {
    const std::vector<int32_t>& tokens = term.file->invocation();
    if (!tokens.empty() && !common.empty() && tokens != common) {
      throw Error(EDGELORA_INVALID_ARGUMENT,
                  "adapters that wait for different invocation tokens cannot be composed: set one "
                  "at a time");
    }
    if (!tokens.empty()) common = tokens;
  }
  return common;
}

// Its terms are complete.
Adapter finished(std::shared_ptr<ActiveAdapter> sum) {
  for (const ActiveAdapter::Term& term : sum->terms) {
    check_finite(term.weight, "the weight of an adapter");
    for (const auto& [target, branch] : term.file->branches()) {
      add_branch(target, branch, term.weight, sum.get());
    }
  }
  for (const auto& [target, rows] : sum->rows) {
    for (const float factor : rows.factors) check_finite(factor, target + ": a row factor");
    for (const float bias : rows.bias) check_finite(bias, target + ": a bias");
  }
  return sum;
}

}  // namespace

Error not_loaded(int64_t handle) {
  return Error(EDGELORA_NOT_FOUND, "adapter handle " + std::to_string(handle) + " is not loaded");
}

const std::string& ActiveAdapter::base_fingerprint() const {
  return onnx_adapter ? onnx_adapter->base_fingerprint() : terms.front().file->base_fingerprint();
}

std::shared_ptr<const Prefix> ActiveAdapter::prefix() const {
  if (terms.empty()) return nullptr;
  const std::shared_ptr<const AdapterFile>& file = terms.front().file;
  if (file->prefix() == nullptr) return nullptr;
  return {file, file->prefix()};
}

std::string shortened(const std::string& fingerprint) {
  constexpr size_t kShown = 7 + 12;  // "sha256:" and some digits
  return fingerprint.size() > kShown ? fingerprint.substr(0, kShown) + "…" : fingerprint;
}

struct AdapterStore::Impl {
  // loaded is reset by unload; held still finds the adapter while a computation has it.
  struct Entry {
    Adapter loaded;
    std::weak_ptr<const ActiveAdapter> held;
  };

  int64_t add(const Adapter& adapter) { return insert({adapter, adapter}); }

  int64_t insert(Entry entry) {
    const std::lock_guard<std::mutex> lock(mutex);
    forget_expired();
    const int64_t handle = ++last_handle;
    entries[handle] = std::move(entry);
    return handle;
  }

  // Its terms are complete.
  int64_t add_sum(std::shared_ptr<ActiveAdapter> sum) {
    sum->invocation = common_invocation(sum->terms);
    if (!sum->invocation.empty()) add_before(sum.get());
    return add(finished(std::move(sum)));
  }

  // What acts until the invocation: nobody's handle to set or unload.
  void add_before(ActiveAdapter* sum) {
    auto before = std::make_shared<ActiveAdapter>();
    for (const ActiveAdapter::Term& term : sum->terms) {
      if (term.file->invocation().empty()) before->terms.push_back(term);
    }
    if (before->terms.empty()) return;
    sum->before = finished(std::move(before));
    sum->before_handle = insert({nullptr, sum->before});
  }

  void forget_expired() {
    for (auto entry = entries.begin(); entry != entries.end();) {
      entry = entry->second.held.expired() ? entries.erase(entry) : std::next(entry);
    }
  }

  mutable std::mutex mutex;
  std::unordered_map<int64_t, Entry> entries;
  int64_t last_handle = 0;
};

AdapterStore::AdapterStore() : impl_(std::make_unique<Impl>()) {}
AdapterStore::~AdapterStore() = default;

AdapterStore& AdapterStore::instance() {
  static auto& store = *new AdapterStore;  // never destroyed: sessions may run until the very end
  return store;
}

int64_t AdapterStore::load(const std::string& path, const std::string& base_fingerprint,
                           const Targets& targets, const PrefixShape& shape) {
  auto adapter = std::make_shared<ActiveAdapter>();
  adapter->terms.push_back(
      {std::make_shared<const AdapterFile>(path, base_fingerprint, targets, shape), 1.0F});
  return impl_->add_sum(std::move(adapter));
}

int64_t AdapterStore::add(std::shared_ptr<const OnnxAdapter> adapter) {
  auto active = std::make_shared<ActiveAdapter>();
  active->invocation = adapter->invocation();
  active->onnx_adapter = std::move(adapter);
  return impl_->add(Adapter(std::move(active)));
}

int64_t AdapterStore::compose(const int64_t* handles, const float* weights, int64_t count) {
  auto sum = std::make_shared<ActiveAdapter>();
  for (int64_t i = 0; i < count; ++i) {
    const Adapter part = find(handles[i]);
    if (!part) throw not_loaded(handles[i]);
    if (part->onnx_adapter || part->prefix()) return impl_->add(sole(part, weights[i], count));
    for (const ActiveAdapter::Term& term : part->terms) {
      add_term(term, weights[i] * term.weight, sum.get());
    }
  }
  if (sum->terms.empty()) {
    throw Error(EDGELORA_INVALID_ARGUMENT, "there are no adapters to compose");
  }
  return impl_->add_sum(std::move(sum));
}

void AdapterStore::unload(int64_t handle) {
  Adapter last;  // its files are unmapped after the lock is gone
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  const auto found = impl_->entries.find(handle);
  if (found == impl_->entries.end() || !found->second.loaded) throw not_loaded(handle);
  last.swap(found->second.loaded);
}

Adapter AdapterStore::find(int64_t handle) const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  const auto found = impl_->entries.find(handle);
  return found == impl_->entries.end() ? nullptr : found->second.loaded;
}

Adapter AdapterStore::resolve(int64_t handle) const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  const auto found = impl_->entries.find(handle);
  return found == impl_->entries.end() ? nullptr : found->second.held.lock();
}

void AdapterStore::branches(const ActiveAdapter& adapter, const std::string& target,
                            std::vector<WeightedBranch>* out) {
  for (const ActiveAdapter::Term& term : adapter.terms) {
    const SideBranch* branch = term.file->branch(target);
    if (branch == nullptr || branch->factors.rank == 0) continue;
    out->push_back({branch, term.weight * branch->scaling});
  }
}

}  // namespace edgelora
