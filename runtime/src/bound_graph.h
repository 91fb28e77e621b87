// The model's graph with one session's kv_cache bound to it: computes positions.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "src/flavor.h"
#include "src/graph_run.h"
#include "src/kv_cache.h"
#include "src/model.h"

namespace edgelora {

// Some tokens that follow what the kv_cache holds.
struct Chunk {
  const int32_t* tokens;
  int64_t count;     // 1…BoundGraph::most_tokens()
  int64_t position;  // of the first token, counted from the first one of the text
};

// Tokens of a prompt that are computed together, of a model whose widest linear has so many
// features: 4 MB of them where these are 128 to 256 tokens. With fewer the weights are read too
// often, with more prefill is no faster.
int64_t tokens_of_run(int64_t widest);

class BoundGraph {
 public:
  BoundGraph(std::shared_ptr<const Model> model, int64_t context_length);

  // Of one run.
  int64_t most_tokens() const { return static_cast<int64_t>(input_ids_.size()); }

  // The adapter of the following runs, which must live until they have ended. Forgets terminate.
  void activate(const RunAdapter& adapter);

  // What the text stands behind from now on; null: nothing. Whatever was computed is void.
  void begin_with(const Prefix* prefix);

  // Computes the chunk; its keys and values are in the kv_cache afterwards. Throws Error; the
  // kv_cache before `position` stays as it was in any case.
  void run_mute(const Chunk& chunk);                 // no logits
  void run_last(const Chunk& chunk, float* logits);  // logits of the last token [vocab_size]
  void run_all(const Chunk& chunk, float* logits);   // logits of every token [count, vocab_size]

  // Makes the runs until the next `activate` fail. From any thread, but not beside `activate`.
  void terminate() { run_.terminate(); }

 private:
  void bind_cache();
  void run(const Chunk& chunk, int64_t rows, float* logits);

  std::shared_ptr<const Model> model_;
  const OnnxRuntime& ort_;
  KvCache cache_;
  int64_t prefix_positions_ = 0;
  std::vector<int64_t> input_ids_;       // [most_tokens()]
  std::vector<int64_t> logits_to_keep_;  // [most_tokens()]
  std::vector<int64_t> attention_mask_;  // all 1, as long as the longest run needed
  RunAdapter adapter_;
  GraphRun run_;
};

}  // namespace edgelora
