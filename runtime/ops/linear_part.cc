#include "ops/linear_part.h"

#include "ops/prefetch.h"

#include <algorithm>

namespace edgelora::ops {
namespace {

std::vector<std::string> read_targets(const NodeInfo& node, size_t count) {
  const std::string joined = node.text("targets");
  std::vector<std::string> targets;
  for (size_t begin = 0; begin <= joined.size();) {
    const size_t comma = std::min(joined.find(',', begin), joined.size());
    targets.push_back(joined.substr(begin, comma - begin));
    if (targets.back().empty()) throw Error(EDGELORA_BAD_FILE, "targets has an empty name");
    begin = comma + 1;
  }
  if (targets.size() != count) {
    throw Error(EDGELORA_BAD_FILE, "targets has " + std::to_string(targets.size()) +
                                       " names, slices has " + std::to_string(count));
  }
  return targets;
}

Activation read_activation(const NodeInfo& node, const kernels::Weights& weights) {
  const std::string name = node.text("activation");
  if (name == "none") return Activation::kNone;
  if (name != "swiglu") {
    throw Error(EDGELORA_BAD_FILE, "activation is \"" + name + "\", expected none or swiglu");
  }
  const int64_t* slices = weights.slices;
  if (weights.slice_count != 2 || slices[0] != slices[1]) {
    throw Error(EDGELORA_BAD_FILE, "swiglu needs two slices of one size: gate and up");
  }
  return Activation::kSwiGlu;
}

LinearNode read_node(const NodeInfo& node, const kernels::Weights& weights) {
  LinearNode read;
  read.refined = node.text("targets") == "lm_head";
  read.norm = node.floats(LinearPart::kNorm, "norm", weights.in_features);
  read.epsilon = node.real("epsilon");
  read.bias = node.floats(LinearPart::kBias, "bias", weights.out_features);
  read.activation = read_activation(node, weights);
  return read;
}

// This thread's list, reused so that decoding does not allocate, and emptied so that no adapter
// stays in memory.
struct Adapters {
  Adapters(AdapterCache& cache, const LinearRun& run) : rows(of_thread()) {
    rows.resolve(cache, run.adapter_ids, run.batch);
  }
  ~Adapters() { rows.release(); }
  static RowAdapters& of_thread() {
    thread_local RowAdapters adapters;
    return adapters;
  }
  RowAdapters& rows;
};

}  // namespace

LinearPart::LinearPart(const Shared& shared, const NodeInfo& node)
    : shared_(shared),
      packed_(node, kCodes, node.integers("slices")),
      node_(read_node(node, packed_.weights())),
      cache_(read_targets(node, static_cast<size_t>(packed_.weights().slice_count)), slices(),
             packed_.weights().in_features) {
  if (!shared.exact) packed_.unpack_absmax(*shared.kernels);
}

std::vector<int64_t> LinearPart::slices() const {
  const kernels::Weights& weights = packed_.weights();
  return {weights.slices, weights.slices + weights.slice_count};
}

int64_t LinearPart::columns() const {
  const int64_t n = packed_.weights().out_features;
  return node_.activation == Activation::kSwiGlu ? n / 2 : n;
}

void LinearPart::prefetch() const {
  ops::prefetch(this, sizeof(*this));
  if (node_.norm != nullptr) ops::prefetch(node_.norm, in_features() * 4);
}

void LinearPart::run(const LinearRun& run) const {
  const Adapters adapters(cache_, run);
  const kernels::Weights& weights = packed_.weights();
  LinearCall call{};
  call.kernels = shared_.kernels;
  call.weights = &weights;
  call.node = node_;
  call.exact = shared_.exact || weights.format == kernels::Format::kFloat;
  call.panels = packed_.panels();
  call.x = run.x;
  call.residual = run.residual;
  call.y = run.y;
  call.rows = run.batch * run.sequence;
  call.sequence_length = run.sequence;
  call.adapters = &adapters.rows;
  call.threads = shared_.crews->threads();
  LinearJob(call).run(shared_.crews);
}

}  // namespace edgelora::ops
