#include "src/bound_graph.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "src/graph_edge.h"

namespace edgelora {
namespace {

// The most features that a linear of the layers has, in or out.
int64_t widest(const Manifest& manifest) {
  int64_t features = 1;
  for (const auto& [target, of_target] : manifest.targets) {
    if (target != "lm_head") features = std::max({features, of_target.first, of_target.second});
  }
  return features;
}

}  // namespace

int64_t tokens_of_run(int64_t widest) {
  constexpr int64_t kValues = 1 << 20, kFewest = 128, kMost = 256;
  return std::clamp(kValues / widest / 32 * 32, kFewest, kMost);
}

BoundGraph::BoundGraph(std::shared_ptr<const Model> model, int64_t context_length)
    : model_(std::move(model)),
      ort_(model_->onnxruntime()),
      cache_(model_->manifest().model, model_->kv_format(), context_length),
      input_ids_(static_cast<size_t>(tokens_of_run(widest(model_->manifest())))),
      logits_to_keep_(input_ids_.size()),
      run_(ort_) {
  bind_cache();
}

// Past and present are one tensor of the whole context: attention then appends in place.
void BoundGraph::bind_cache() {
  const int32_t layers = model_->manifest().model.num_hidden_layers;
  const std::vector<std::string> past = past_names(layers);
  const std::vector<std::string> present = present_names(layers);
  for (size_t i = 0; i < past.size(); ++i) {
    run_.set_input(past[i], cache_.tensor(ort_, i));
    run_.set_output(present[i], cache_.tensor(ort_, i));
  }
}

void BoundGraph::activate(const RunAdapter& adapter) {
  adapter_ = adapter;
  run_.renew_options();
  model_->flavor().activate(ort_, &adapter_, &run_);
}

void BoundGraph::begin_with(const Prefix* prefix) {
  prefix_positions_ = 0;
  if (prefix == nullptr) return;
  cache_.put(*prefix);
  prefix_positions_ = prefix->positions;
}

void BoundGraph::run(const Chunk& chunk, int64_t rows, float* logits) {
  std::copy_n(chunk.tokens, chunk.count, input_ids_.begin());
  run_.set_input("input_ids", ort_.tensor(input_ids_.data(), {1, chunk.count}));
  const int64_t positions = prefix_positions_ + chunk.position + chunk.count;
  if (static_cast<int64_t>(attention_mask_.size()) < positions) {
    attention_mask_.resize(static_cast<size_t>(positions), 1);
  }
  run_.set_input("attention_mask", ort_.tensor(attention_mask_.data(), {1, positions}));
  run_.set_input("logits_to_keep", ort_.tensor(logits_to_keep_.data(), {rows}));
  run_.set_output("logits", ort_.tensor(logits, {1, rows, model_->manifest().model.vocab_size}));
  run_.run(model_->ort_session());
}

void BoundGraph::run_mute(const Chunk& chunk) {
  float none;  // a tensor without elements has an address too
  run(chunk, 0, &none);
}

void BoundGraph::run_last(const Chunk& chunk, float* logits) {
  logits_to_keep_[0] = chunk.count - 1;
  run(chunk, 1, logits);
}

void BoundGraph::run_all(const Chunk& chunk, float* logits) {
  std::iota(logits_to_keep_.begin(), logits_to_keep_.end(), int64_t{0});
  run(chunk, chunk.count, logits);
}

}  // namespace edgelora
