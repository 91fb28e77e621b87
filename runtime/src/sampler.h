// Logits to the next token: greedy, or drawn after transformers' filters in transformers' order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "src/random.h"

namespace edgelora {

struct Sampling {
  float temperature = 0;         // 0: greedy
  int32_t top_k = 0;             // 0: off
  float top_p = 1;               // 1: off
  float min_p = 0;               // 0: off
  float repetition_penalty = 1;  // 1: off
  uint64_t seed = 0;

  // Throws Error that names the option that is out of its range.
  void check() const;
};

class Sampler {
 public:
  // `history`: the tokens that the repetition penalty counts from the start.
  Sampler(const Sampling& sampling, size_t vocab_size, const std::vector<int32_t>& history);

  // The next token; logits [vocab_size]. Throws Error if one of them is NaN or none is finite.
  int32_t sample(const float* logits);

  // `token` was added to the sequence.
  void add(int32_t token);

  struct Candidate {
    float score;  // the logit; after `weigh` the probability over that of the best token
    int32_t token;
  };

  // The token at `left`, from 0 to the sum of all scores, when they are laid end to end; never one
  // with score 0. At least one score is positive.
  static int32_t pick(const Candidate* candidates, size_t count, double left);

 private:
  static bool better(const Candidate& x, const Candidate& y);

  const float* penalize(const float* logits);
  int32_t draw(const float* logits, float best);
  size_t keep_top_k(const float* logits);
  void weigh(size_t count, float best);
  double sum(size_t count) const;
  size_t keep_top_p(size_t count);
  size_t keep_min_p(size_t count);

  Sampling sampling_;
  size_t vocab_size_;
  Random random_;
  std::vector<bool> seen_;             // [vocab_size], only with a penalty
  std::vector<int32_t> seen_tokens_;   // those set in seen_
  std::vector<float> penalized_;       // [vocab_size], only with a penalty
  std::vector<Candidate> candidates_;  // [vocab_size], only when drawing; those kept come first
};

// The lowest index of the largest of values [count]; throws Error if one is NaN or none is finite.
size_t argmax(const float* values, size_t count);

}  // namespace edgelora
