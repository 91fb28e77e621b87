#include "src/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>

#include "src/error.h"

namespace edgelora {
namespace {

void require(bool condition, const char* name, float value, const char* range) {
  if (condition) return;
  char shown[32];  // also of 1e-39, which std::to_string shows as 0
  std::snprintf(shown, sizeof shown, "%g", static_cast<double>(value));
  throw Error(EDGELORA_INVALID_ARGUMENT, std::string(name) + " is " + shown + ", not " + range);
}

// The largest, NaN if there is one. In integers that are ordered as floats, which the compiler
// vectorizes: magnitudes above Inf's are NaN.
float largest_of(const float* values, size_t count) {
  constexpr int32_t kMagnitude = 0x7fffffff, kInf = 0x7f800000;
  int32_t most = std::numeric_limits<int32_t>::min(), nan = 0;
  for (size_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    nan |= kInf - (bits & kMagnitude);  // < 0
    most = std::max(most, bits ^ (bits >> 31 & kMagnitude));
  }
  if (nan < 0) return std::numeric_limits<float>::quiet_NaN();
  most ^= most >> 31 & kMagnitude;
  float largest;
  std::memcpy(&largest, &most, sizeof largest);
  return largest;
}

}  // namespace

void Sampling::check() const {
  require(temperature >= 0 && std::isfinite(temperature), "temperature", temperature,
          "a finite number ≥ 0");
  require(top_k >= 0, "top_k", static_cast<float>(top_k), "≥ 0");
  require(top_p > 0 && top_p <= 1, "top_p", top_p, "in (0, 1]");
  require(min_p >= 0 && min_p <= 1, "min_p", min_p, "in [0, 1]");
  // Beyond this logits overflow, which would look like a damaged model.
  require(repetition_penalty >= 1e-6f && repetition_penalty <= 1e6f, "repetition_penalty",
          repetition_penalty, "in [1e-6, 1e6]");
}

// Strip by strip, so that the place is looked for in one strip alone.
size_t argmax(const float* values, size_t count) {
  constexpr size_t kStrip = 1024;
  size_t best = 0;
  float largest = -std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < count && !std::isnan(largest); i += kStrip) {
    const float found = largest_of(values + i, std::min(kStrip, count - i));
    if (found <= largest) continue;  // not where it is NaN
    best = i;
    largest = found;
  }
  if (!std::isfinite(largest)) {
    throw Error(EDGELORA_RUNTIME,
                "the model's logits are not numbers: damaged weights or a broken adapter");
  }
  return static_cast<size_t>(std::find(values + best, values + count, largest) - values);
}

Sampler::Sampler(const Sampling& sampling, size_t vocab_size, const std::vector<int32_t>& history)
    : sampling_(sampling), vocab_size_(vocab_size), random_(sampling.seed) {
  if (sampling_.temperature > 0) candidates_.resize(vocab_size);
  if (sampling_.repetition_penalty == 1) return;
  seen_.resize(vocab_size);
  seen_tokens_.reserve(vocab_size);
  penalized_.resize(vocab_size);
  for (const int32_t token : history) add(token);
}

void Sampler::add(int32_t token) {
  if (seen_.empty() || seen_[static_cast<size_t>(token)]) return;
  seen_[static_cast<size_t>(token)] = true;
  seen_tokens_.push_back(token);
}

const float* Sampler::penalize(const float* logits) {
  if (seen_.empty()) return logits;
  std::copy_n(logits, vocab_size_, penalized_.data());
  for (const int32_t token : seen_tokens_) {
    float& logit = penalized_[static_cast<size_t>(token)];
    logit = logit < 0 ? logit * sampling_.repetition_penalty : logit / sampling_.repetition_penalty;
  }
  return penalized_.data();
}

bool Sampler::better(const Candidate& x, const Candidate& y) {
  return x.score > y.score || (x.score == y.score && x.token < y.token);
}

// Sorted whenever something is cut, so that the order, and with it the draw, depends on no
// library's algorithm.
size_t Sampler::keep_top_k(const float* logits) {
  for (size_t i = 0; i < vocab_size_; ++i) candidates_[i] = {logits[i], static_cast<int32_t>(i)};
  const auto k = static_cast<size_t>(sampling_.top_k);
  if (k == 0 || k >= vocab_size_) return vocab_size_;
  std::partial_sort(candidates_.begin(), candidates_.begin() + sampling_.top_k, candidates_.end(),
                    better);
  return k;
}

void Sampler::weigh(size_t count, float best) {
  for (size_t i = 0; i < count; ++i) {
    candidates_[i].score = std::exp((candidates_[i].score - best) / sampling_.temperature);
  }
}

double Sampler::sum(size_t count) const {
  double total = 0;
  for (size_t i = 0; i < count; ++i) total += static_cast<double>(candidates_[i].score);
  return total;
}

// Keeps a token while those before it hold less than top_p. Sorts only as far as needed, in growing
// runs.
size_t Sampler::keep_top_p(size_t count) {
  if (sampling_.top_p == 1) return count;
  const double wanted = static_cast<double>(sampling_.top_p) * sum(count);
  double mass = 0;
  size_t i = 0;
  for (size_t sorted = std::min<size_t>(64, count);; sorted = std::min(sorted * 8, count)) {
    const auto begin = candidates_.begin();
    using Offset = decltype(candidates_)::difference_type;
    std::partial_sort(begin + static_cast<Offset>(i), begin + static_cast<Offset>(sorted),
                      begin + static_cast<Offset>(count), better);
    for (; i < sorted; ++i) {
      if (i > 0 && mass >= wanted) return i;
      mass += static_cast<double>(candidates_[i].score);
    }
    if (sorted == count) return count;
  }
}

size_t Sampler::keep_min_p(size_t count) {
  if (sampling_.min_p == 0) return count;
  const auto end = candidates_.begin() + static_cast<decltype(candidates_)::difference_type>(count);
  const auto unlikely = [this](const Candidate& candidate) {
    return candidate.score < sampling_.min_p;
  };
  return static_cast<size_t>(std::remove_if(candidates_.begin(), end, unlikely) -
                             candidates_.begin());
}

int32_t Sampler::draw(const float* logits, float best) {
  size_t count = keep_top_k(logits);
  weigh(count, best);
  count = keep_min_p(keep_top_p(count));
  return pick(candidates_.data(), count, random_.uniform() * sum(count));
}

int32_t Sampler::pick(const Candidate* candidates, size_t count, double left) {
  int32_t token = candidates[0].token;
  for (size_t i = 0; i < count && left >= 0; ++i) {
    if (candidates[i].score > 0) token = candidates[i].token;
    left -= static_cast<double>(candidates[i].score);
  }
  return token;  // where rounding left a crumb, the last that can be drawn
}

int32_t Sampler::sample(const float* logits) {
  const float* scores = penalize(logits);
  const size_t best = argmax(scores, vocab_size_);
  if (sampling_.temperature == 0) return static_cast<int32_t>(best);
  return draw(scores, scores[best]);
}

}  // namespace edgelora
