// One sequence: its tokens, its kv_cache, its active adapter.
//
// An adapter may have a prefix: keys and values that the kv_cache then begins with, so that the
// text stands behind them. The history is the text alone.
//
// The history may run ahead of the kv_cache: the last generated token is computed only when
// something follows it, and a change of adapter makes all positions due again. Every step first
// computes what is due.
//
// A call that changes or computes something has the session to itself: another, from a token
// callback or another thread, is refused.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "edgelora.h"
#include "src/bound_graph.h"
#include "src/cached_positions.h"
#include "src/model.h"
#include "src/sampler.h"
#include "src/timings.h"

namespace edgelora {

struct GenerateOptions {
  Sampling sampling;
  std::vector<int32_t> stop_tokens;  // the model's own included, unless they are to be ignored
  size_t max_new_tokens;
  EdgeLoraTokenCallback callback;  // may be null
  void* user_data;
};

struct GenerateResult {
  size_t count;
  EdgeLoraFinish finish;
};

struct SessionOptions {
  int32_t context_length = 0;  // 0: the model's
  bool invoked = false;        // no adapter waits for its invocation tokens
};

class Session {
 public:
  // Throws Error.
  Session(std::shared_ptr<const Model> model, const SessionOptions& options);

  enum class Cache { kRecompute, kKeep };
  void set_adapter(int64_t adapter, Cache cache);

  void prefill(const int32_t* tokens, size_t count);
  void logits(const int32_t* tokens, size_t count, float* logits);  // [count, vocab_size]
  void rewind(size_t position);
  GenerateResult generate(const GenerateOptions& options, int32_t* tokens);

  // From any thread.
  void cancel();

  // Of the text: an adapter's prefix is not counted.
  size_t position() const { return tokens_.size(); }
  const float* last_logits() const;  // [vocab_size], or null
  const Timings& timings() const { return timings_; }
  const Model& model() const { return *model_; }

 private:
  class Use;
  class Call;

  void begin(const ActiveAdapter* adapter);
  void activate(int64_t adapter);
  void look_for_invocation();
  void check_prefix(const Prefix* prefix) const;
  bool is_kept_prefix(const Prefix* prefix) const;
  size_t room() const;
  void check_tokens(const int32_t* tokens, size_t count) const;
  void extend(const int32_t* tokens, size_t count, float* all_logits);
  void make_due();
  void compute(size_t end, float* all_logits);
  void run_chunk(const Chunk& chunk, bool is_last, float* all_logits);
  void commit_logits();
  void compute_due();
  bool is_stale() const;
  bool has_logits() const;

  std::shared_ptr<const Model> model_;
  size_t context_length_;  // positions
  BoundGraph graph_;
  std::vector<int32_t> tokens_;  // the history
  CachedPositions cached_;       // at most tokens_
  std::shared_ptr<const Prefix> active_prefix_;  // of adapter_; null: none
  std::shared_ptr<const Prefix> cached_prefix_;  // at the kv_cache's front, before those of cached_
  int64_t adapter_ = 0;
  Cache cache_ = Cache::kRecompute;  // what a change to adapter_ makes of the kv_cache
  const bool invoked_;
  std::vector<int32_t> invocation_;  // tokens that adapter_ waits for
  WantedAdapters wanted_;            // as of tokens_ when the present call began
  const ActiveAdapter* active_ = nullptr;  // of adapter_, for the present call
  int64_t in_graph_ = 0;                   // the adapter of its next run
  std::vector<float> logits_;  // [vocab_size] of the last token of the first logits_position_ ones
  std::vector<float>
      next_logits_;  // [vocab_size] where runs write, so that a failed one leaves logits_ alone
  size_t logits_position_ = 0;  // 0: none
  int64_t computed_ = 0;        // positions since the present call began
  Timings timings_;
  std::atomic<bool> in_use_{false};
  std::mutex cancel_mutex_;  // of a call's begin, and of a cancel
  std::atomic<bool> cancelled_{false};
};

}  // namespace edgelora
