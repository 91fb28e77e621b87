#include "src/selfcheck.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include "src/adapter_store.h"
#include "src/error.h"
#include "src/selfcheck_file.h"
#include "src/session.h"

namespace edgelora {
namespace {

using Tokens = std::vector<int32_t>;

// A bundle's adapter for as long as it is checked.
class Loaded {
 public:
  Loaded(const Model& model, const std::string& name)
      : handle_(name.empty() ? 0 : model.load_adapter(name)) {}
  ~Loaded() {
    if (handle_ != 0) AdapterStore::instance().unload(handle_);
  }
  Loaded(const Loaded&) = delete;
  Loaded& operator=(const Loaded&) = delete;
  int64_t handle() const { return handle_; }

 private:
  const int64_t handle_;
};

size_t prefix_positions(const Model& model, const Loaded& adapter) {
  const std::shared_ptr<const ActiveAdapter> active = model.find_adapter(adapter.handle());
  const std::shared_ptr<const Prefix> prefix = active ? active->prefix() : nullptr;
  return prefix ? static_cast<size_t>(prefix->positions) : 0;
}

// [tokens, vocab_size] of a prompt: all but its last token at once, then that alone, so that the
// kernels of prefill and of decode are both in use.
std::vector<float> compute(Session* session, const Tokens& prompt, size_t vocab_size) {
  std::vector<float> logits(prompt.size() * vocab_size);
  session->rewind(0);
  const size_t first = prompt.size() - 1;
  if (first > 0) session->logits(prompt.data(), first, logits.data());
  session->prefill(&prompt[first], 1);
  std::copy_n(session->last_logits(), vocab_size, logits.data() + first * vocab_size);
  return logits;
}

// Found beside expected.
struct Comparison {
  double squares = 0;     // of the differences
  double farthest = -1;   // difference; NaN if one is
  ExpectedLogit logit{};  // that is farthest off
  double found = 0;

  void add(const ExpectedLogit& expected, double value) {
    const double difference = std::abs(value - expected.value);
    squares += difference * difference;
    if (std::isnan(farthest) || difference <= farthest) return;
    farthest = difference;
    logit = expected;
    found = value;
  }
};

Comparison compare(const std::shared_ptr<const Model>& model, const Expectations& expectations,
                   const std::string& name) {
  const Loaded adapter(*model, name);
  const auto vocab_size = static_cast<size_t>(model->manifest().model.vocab_size);
  Comparison comparison;
  for (size_t i = 0; i < expectations.prompts.size(); ++i) {
    const Tokens& prompt = expectations.prompts[i];
    const size_t positions = prompt.size() + prefix_positions(*model, adapter);
    Session session(model, {static_cast<int32_t>(positions), true});
    session.set_adapter(adapter.handle(), Session::Cache::kRecompute);
    const std::vector<float> logits = compute(&session, prompt, vocab_size);
    for (const ExpectedLogit& logit : expectations.entries.at(name).logits) {
      if (logit.prompt != i) continue;
      const size_t at = logit.position * vocab_size + static_cast<size_t>(logit.token);
      comparison.add(logit, static_cast<double>(logits[at]));
    }
  }
  return comparison;
}

std::string failure(const Model& model, const EdgeLoraSelfcheck& result, const Comparison& worst) {
  std::ostringstream text;
  text.precision(4);
  const std::string whose =
      result.adapter == nullptr ? "the base" : "adapter \"" + std::string(result.adapter) + '"';
  text << model.manifest().folder << ": self-check: " << whose
       << " computes other logits than at export: root mean square of the differences "
       << result.error << ", allowed " << result.tolerance << " (accuracy "
       << (result.exact ? "float" : "int8") << "); farthest off: prompt " << worst.logit.prompt
       << ", position " << worst.logit.position << ", token " << worst.logit.token << ": expected "
       << worst.logit.value << ", found " << worst.found
       << "; copy the bundle again, or export it again";
  return text.str();
}

// adapter null: the base.
EdgeLoraSelfcheck unchecked(const Model& model, const char* adapter) {
  return {sizeof(EdgeLoraSelfcheck), adapter, model.options().exact, false, 0, 0, 0};
}

void check_one(const std::shared_ptr<const Model>& model, const Expectations& expectations,
               const char* adapter, const Report& report) {
  const std::string name = adapter == nullptr ? "" : adapter;
  const Expectation& expectation = expectations.entries.at(name);
  const Comparison comparison = compare(model, expectations, name);
  const auto count = static_cast<double>(expectation.logits.size());
  EdgeLoraSelfcheck result = unchecked(*model, adapter);
  result.checked = true;
  result.logits = static_cast<int32_t>(expectation.logits.size());
  result.error = std::sqrt(comparison.squares / count);
  result.tolerance = expectation.tolerance;
  report(result);
  if (result.error <= result.tolerance) return;  // NaN is not
  throw Error(EDGELORA_SELFCHECK_FAILED, failure(*model, result, comparison));
}

void check_all(const std::shared_ptr<const Model>& model, const Report& report) {
  const Expectations expectations = read_selfcheck(*model);
  check_one(model, expectations, nullptr, report);
  for (const char* name : model->adapter_names()) {
    if (model->manifest().selfchecked.count(name) == 0) {
      report(unchecked(*model, name));
    } else {
      check_one(model, expectations, name, report);
    }
  }
}

// The same bundle, computed with float32 activations.
std::shared_ptr<const Model> exact_twin(const Model& model) {
  ModelOptions options = model.options();
  options.exact = true;
  return std::make_shared<const Model>(model.manifest().folder, options);
}

}  // namespace

void selfcheck(const std::shared_ptr<const Model>& model, const Report& report) {
  model->check_process();
  const bool has_twin = !model->options().exact && model->manifest().flavor == "edgelora";
  if (has_twin) check_all(exact_twin(*model), report);
  check_all(model, report);
}

}  // namespace edgelora
