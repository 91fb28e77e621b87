#include "src/bound_graph.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "src/graph_edge.h"

namespace edgelora {
namespace {

OrtHandle<OrtIoBinding> create_binding(const Model& model) {
  const OnnxRuntime& ort = model.onnxruntime();
  OrtIoBinding* binding = nullptr;
  ort.check(ort.api().CreateIoBinding(model.ort_session(), &binding));
  return {binding, ort.api().ReleaseIoBinding};
}

OrtHandle<OrtRunOptions> create_run_options(const OnnxRuntime& ort) {
  OrtRunOptions* options = nullptr;
  ort.check(ort.api().CreateRunOptions(&options));
  return {options, ort.api().ReleaseRunOptions};
}

}  // namespace

BoundGraph::BoundGraph(std::shared_ptr<const Model> model, int64_t context_length)
    : model_(std::move(model)),
      ort_(model_->onnxruntime()),
      context_length_(context_length),
      cache_(model_->manifest().model, context_length),
      input_ids_(static_cast<size_t>(kMostTokens)),
      logits_to_keep_(static_cast<size_t>(kMostTokens)),
      attention_mask_(static_cast<size_t>(context_length), 1),
      binding_(create_binding(*model_)),
      run_options_(create_run_options(ort_)) {
  bind_cache();
  bind_input("adapter_ids", ort_.tensor(&adapter_id_, {1}));
}

void BoundGraph::bind_input(const char* name, const OrtHandle<OrtValue>& value) {
  ort_.check(ort_.api().BindInput(binding_.get(), name, value.get()));
}

void BoundGraph::bind_output(const char* name, const OrtHandle<OrtValue>& value) {
  ort_.check(ort_.api().BindOutput(binding_.get(), name, value.get()));
}

// Past and present are one tensor of the whole context: GroupQueryAttention then appends in place.
void BoundGraph::bind_cache() {
  const ManifestModel& shape = model_->manifest().model;
  const std::vector<std::string> past = past_names(shape.num_hidden_layers);
  const std::vector<std::string> present = present_names(shape.num_hidden_layers);
  for (size_t i = 0; i < past.size(); ++i) {
    const OrtHandle<OrtValue> value = ort_.tensor(
        cache_.tensor(i), {1, shape.num_key_value_heads, context_length_, shape.head_dim});
    bind_input(past[i].c_str(), value);
    bind_output(present[i].c_str(), value);
  }
}

void BoundGraph::run(const Chunk& chunk, int64_t rows, float* logits) {
  std::copy_n(chunk.tokens, chunk.count, input_ids_.begin());
  adapter_id_ = chunk.adapter;
  bind_input("input_ids", ort_.tensor(input_ids_.data(), {1, chunk.count}));
  bind_input("attention_mask",
             ort_.tensor(attention_mask_.data(), {1, chunk.position + chunk.count}));
  bind_input("logits_to_keep", ort_.tensor(logits_to_keep_.data(), {rows}));
  bind_output("logits", ort_.tensor(logits, {1, rows, model_->manifest().model.vocab_size}));
  ort_.check(ort_.api().RunWithBinding(model_->ort_session(), run_options_.get(), binding_.get()));
}

void BoundGraph::run_last(const Chunk& chunk, float* logits) {
  logits_to_keep_[0] = chunk.count - 1;
  run(chunk, 1, logits);
}

void BoundGraph::run_all(const Chunk& chunk, float* logits) {
  std::iota(logits_to_keep_.begin(), logits_to_keep_.end(), int64_t{0});
  run(chunk, chunk.count, logits);
}

void BoundGraph::terminate() { ort_.check(ort_.api().RunOptionsSetTerminate(run_options_.get())); }

void BoundGraph::allow() { ort_.check(ort_.api().RunOptionsUnsetTerminate(run_options_.get())); }

}  // namespace edgelora
