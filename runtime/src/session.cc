#include "src/session.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/ceil_div.h"
#include "src/error.h"

namespace edgelora {
namespace {

size_t choose_context(const ManifestModel& model, int32_t asked) {
  if (asked < 0 || asked > model.context_length) {
    throw Error(EDGELORA_INVALID_ARGUMENT, "context_length is " + std::to_string(asked) +
                                               ", not in 0…" +
                                               std::to_string(model.context_length));
  }
  return static_cast<size_t>(asked == 0 ? model.context_length : asked);
}

size_t vocabulary(const Model& model) {
  return static_cast<size_t>(model.manifest().model.vocab_size);
}

bool contains(const std::vector<int32_t>& tokens, int32_t token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

// Where the last occurrence begins.
size_t last_occurrence(const std::vector<int32_t>& tokens, const std::vector<int32_t>& wanted) {
  const auto found = std::find_end(tokens.begin(), tokens.end(), wanted.begin(), wanted.end());
  if (found == tokens.end()) return WantedAdapters::kNever;
  return static_cast<size_t>(found - tokens.begin());
}

Error cancelled() { return {EDGELORA_CANCELLED, "cancelled"}; }

}  // namespace

// The session is this call's until it ends.
class Session::Use {
 public:
  explicit Use(Session* session) : in_use_(session->in_use_) {
    if (!in_use_.exchange(true)) return;
    throw Error(
        EDGELORA_INVALID_ARGUMENT,
        "the session is in a call: a token callback, or another thread, may ask where it is "
        "or cancel it, nothing else");
  }
  ~Use() { in_use_ = false; }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  std::atomic<bool>& in_use_;
};

// A use that computes: it holds the adapter, whoever unloads it meanwhile.
class Session::Call {
 public:
  explicit Call(Session* session)
      : use_(session), adapter_(session->model_->find_adapter(session->adapter_)) {
    session->begin(adapter_.get());
  }

 private:
  const Use use_;
  const std::shared_ptr<const ActiveAdapter> adapter_;
};

Session::Session(std::shared_ptr<const Model> model, const SessionOptions& options)
    : model_(std::move(model)),
      context_length_(choose_context(model_->manifest().model, options.context_length)),
      graph_(model_, static_cast<int64_t>(context_length_)),
      invoked_(options.invoked),
      logits_(vocabulary(*model_)),
      next_logits_(vocabulary(*model_)) {}

void Session::set_adapter(int64_t adapter, Cache cache) {
  const Use use(this);
  const std::shared_ptr<const ActiveAdapter> found = model_->find_adapter(adapter);
  std::shared_ptr<const Prefix> prefix = found ? found->prefix() : nullptr;
  check_prefix(prefix.get());
  if (cache == Cache::kKeep && !is_kept_prefix(prefix.get())) {
    throw Error(EDGELORA_INVALID_ARGUMENT,
                "the kv_cache cannot be kept: with the adapter's prefix, or without the former "
                "one's, the text stands at other positions; set it without keep_cache");
  }
  const bool waits = found && !invoked_;
  invocation_ = waits ? found->invocation : std::vector<int32_t>();
  wanted_ = {waits ? found->before_handle : 0, adapter, 0};
  active_prefix_ = std::move(prefix);
  adapter_ = adapter;
  cache_ = cache;
  look_for_invocation();
}

// Tokens that a generate delivers do not move it until the next call, as in PEFT.
void Session::look_for_invocation() {
  wanted_.start = invocation_.empty() ? 0 : last_occurrence(tokens_, invocation_);
}

void Session::check_prefix(const Prefix* prefix) const {
  if (prefix == nullptr || static_cast<size_t>(prefix->positions) < context_length_) return;
  throw Error(EDGELORA_CONTEXT_FULL,
              "the adapter's prefix takes " + std::to_string(prefix->positions) +
                  " positions, the context has " + std::to_string(context_length_) +
                  ": nothing is left for text; make a session with a longer context_length");
}

bool Session::is_kept_prefix(const Prefix* prefix) const {
  return cached_.size() == 0 || cached_prefix_.get() == prefix;
}

// Tokens that the context holds.
size_t Session::room() const {
  const int64_t taken = active_prefix_ ? active_prefix_->positions : 0;
  return context_length_ - static_cast<size_t>(taken);
}

// A cancel from now on is for this call.
void Session::begin(const ActiveAdapter* adapter) {
  model_->check_process();
  computed_ = 0;
  const std::lock_guard<std::mutex> lock(cancel_mutex_);
  cancelled_ = false;
  graph_.activate({adapter_, adapter});
  active_ = adapter;
  in_graph_ = adapter_;
}

// The adapter of the next run: the present one, or what acts before its invocation.
void Session::activate(int64_t adapter) {
  if (adapter == in_graph_) return;
  const std::lock_guard<std::mutex> lock(cancel_mutex_);
  graph_.activate({adapter, adapter == adapter_ ? active_ : active_->before.get()});
  in_graph_ = adapter;
}

void Session::cancel() {
  const std::lock_guard<std::mutex> lock(cancel_mutex_);
  cancelled_ = true;
  graph_.terminate();
}

void Session::check_tokens(const int32_t* tokens, size_t count) const {
  if (count == 0)
    throw Error(EDGELORA_INVALID_ARGUMENT, "the prompt is empty: 0 tokens, at least 1 is needed");
  if (tokens_.size() > room() || count > room() - tokens_.size()) {
    throw Error(EDGELORA_CONTEXT_FULL, "the context is full: it has room for " +
                                           std::to_string(room()) + " tokens" +
                                           (active_prefix_ ? " behind the prefix, " : ", ") +
                                           std::to_string(tokens_.size()) + " are in it, " +
                                           std::to_string(count) + " more do not fit");
  }
  const size_t vocab_size = vocabulary(*model_);
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] >= 0 && static_cast<size_t>(tokens[i]) < vocab_size) continue;
    throw Error(EDGELORA_INVALID_ARGUMENT, "token " + std::to_string(i) + " is " +
                                               std::to_string(tokens[i]) + ", not in 0…" +
                                               std::to_string(vocab_size - 1));
  }
}

// Sets the kv_cache back to where the adapter, or missing logits, make it start again.
void Session::make_due() {
  if (is_stale()) {
    cached_.shorten(cached_.agreeing(wanted_));
    logits_position_ = 0;
  }
  if (!has_logits()) cached_.shorten(tokens_.size() - 1);
}

void Session::run_chunk(const Chunk& chunk, bool is_last, float* all_logits) {
  if (cancelled_) throw cancelled();
  try {
    if (all_logits != nullptr) {
      graph_.run_all(chunk, all_logits);
    } else if (is_last) {
      graph_.run_last(chunk, next_logits_.data());
    } else {
      graph_.run_mute(chunk);
    }
  } catch (const Error&) {
    if (cancelled_) throw cancelled();
    throw;
  }
}

// The positions up to `end` that are not cached; logits of all of them [positions, vocab_size], or
// only of the last one into next_logits_.
void Session::compute(size_t end, float* all_logits) {
  for (size_t begin; (begin = cached_.size()) < end;) {
    if (begin == 0 && cached_prefix_ != active_prefix_) {
      cached_prefix_.reset();  // until all of it is written
      graph_.begin_with(active_prefix_.get());
      cached_prefix_ = active_prefix_;
    }
    const size_t last = std::min(end, wanted_.end_of(begin));
    const auto left = static_cast<int64_t>(last - begin);
    const int64_t runs = kernels::ceil_div(left, graph_.most_tokens());
    const int64_t count = kernels::ceil_div(left, runs);  // all alike: none has a token or two
    const size_t next = begin + static_cast<size_t>(count);
    activate(wanted_.at(begin));
    run_chunk({tokens_.data() + begin, count, static_cast<int64_t>(begin)}, next == end,
              all_logits);
    if (all_logits != nullptr) all_logits += (next - begin) * vocabulary(*model_);
    cached_.lengthen(next, wanted_.at(begin));
    computed_ += count;
  }
}

void Session::commit_logits() {
  std::swap(logits_, next_logits_);
  logits_position_ = cached_.size();
}

void Session::compute_due() {
  make_due();
  if (cached_.size() == tokens_.size()) return;
  compute(tokens_.size(), nullptr);
  commit_logits();
}

void Session::extend(const int32_t* tokens, size_t count, float* all_logits) {
  const Call call(this);
  check_tokens(tokens, count);
  const Stopwatch stopwatch;
  const size_t before = tokens_.size();
  const size_t logits_before = has_logits() ? logits_position_ : 0;
  tokens_.insert(tokens_.end(), tokens, tokens + count);
  look_for_invocation();
  try {
    make_due();
    if (all_logits != nullptr) {
      compute(before, nullptr);
      compute(tokens_.size(), all_logits);
      std::copy_n(all_logits + (count - 1) * next_logits_.size(), next_logits_.size(),
                  next_logits_.begin());
    }
    compute(tokens_.size(), nullptr);
  } catch (...) {
    tokens_.resize(before);
    look_for_invocation();
    cached_.shorten(before);
    logits_position_ = logits_before;
    throw;
  }
  commit_logits();
  timings_.prefill_seconds = stopwatch.seconds();
  timings_.prefill_tokens = computed_;
}

void Session::prefill(const int32_t* tokens, size_t count) { extend(tokens, count, nullptr); }

void Session::logits(const int32_t* tokens, size_t count, float* logits) {
  extend(tokens, count, logits);
}

void Session::rewind(size_t position) {
  const Use use(this);
  if (position > tokens_.size()) {
    throw Error(EDGELORA_INVALID_ARGUMENT, "cannot rewind to position " + std::to_string(position) +
                                               ": the session holds " +
                                               std::to_string(tokens_.size()));
  }
  tokens_.resize(position);
  cached_.shorten(position);
  if (logits_position_ != position) logits_position_ = 0;
  look_for_invocation();
}

// The kv_cache is another adapter's and is not to be kept.
bool Session::is_stale() const {
  if (cache_ == Cache::kKeep) return false;
  if (invocation_.empty()) return cached_.ends_with_other_than(adapter_);
  return cached_.agreeing(wanted_) < cached_.size();
}

bool Session::has_logits() const { return !is_stale() && logits_position_ == tokens_.size(); }

const float* Session::last_logits() const {
  return has_logits() && !tokens_.empty() ? logits_.data() : nullptr;
}

GenerateResult Session::generate(const GenerateOptions& options, int32_t* tokens) {
  const Call call(this);
  if (tokens_.empty())
    throw Error(EDGELORA_INVALID_ARGUMENT, "nothing to generate after: prefill first");
  options.sampling.check();
  look_for_invocation();
  const Stopwatch stopwatch;
  Sampler sampler(options.sampling, vocabulary(*model_), tokens_);
  GenerateResult result = {0, EDGELORA_FINISH_LENGTH};
  while (result.count < options.max_new_tokens) {
    if (tokens_.size() >= room()) {
      result.finish = EDGELORA_FINISH_CONTEXT;
      break;
    }
    compute_due();
    const int32_t token = sampler.sample(logits_.data());
    if (contains(options.stop_tokens, token)) {
      result.finish = EDGELORA_FINISH_STOP;
      break;
    }
    tokens_.push_back(token);
    sampler.add(token);
    if (tokens != nullptr) tokens[result.count] = token;
    ++result.count;
    if (options.callback != nullptr && !options.callback(token, options.user_data)) {
      result.finish = EDGELORA_FINISH_CALLBACK;
      break;
    }
  }
  timings_.decode_seconds = stopwatch.seconds();
  timings_.decode_tokens = computed_;
  return result;
}

}  // namespace edgelora
