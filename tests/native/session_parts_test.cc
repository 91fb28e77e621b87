// What a session is made of, without a model: the positions that are cached, the token that is
// drawn.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "src/bound_graph.h"
#include "src/cached_positions.h"
#include "src/error.h"
#include "src/sampler.h"
#include "test_check.h"

namespace edgelora::test {
namespace {

void test_cached_positions_know_who_computed_the_last_one() {
  CachedPositions cached;
  CHECK(cached.size() == 0 && !cached.ends_with_other_than(7));
  cached.lengthen(10, 7);
  cached.lengthen(20, 7);
  cached.lengthen(30, 8);
  CHECK(cached.size() == 30 && cached.ends_with_other_than(7) && !cached.ends_with_other_than(8));
  cached.shorten(21);
  CHECK(cached.size() == 21 && !cached.ends_with_other_than(8));
  cached.shorten(20);
  CHECK(cached.size() == 20 && !cached.ends_with_other_than(7));
  cached.lengthen(25, 9);
  cached.shorten(5);
  CHECK(cached.size() == 5 && !cached.ends_with_other_than(7));
  cached.shorten(0);
  CHECK(cached.size() == 0 && !cached.ends_with_other_than(7) && !cached.ends_with_other_than(8));
}

void test_positions_agree_up_to_the_first_of_another_adapter() {
  CachedPositions cached;
  CHECK(cached.agreeing({0, 7, 3}) == 0);
  cached.lengthen(10, 0);
  CHECK(cached.agreeing({0, 7, 4}) == 4);
  CHECK(cached.agreeing({0, 7, 10}) == 10);
  CHECK(cached.agreeing({0, 7, WantedAdapters::kNever}) == 10);
  CHECK(cached.agreeing({0, 7, 0}) == 0);
  CHECK(cached.agreeing({0, 0, 4}) == 10);
  cached.lengthen(20, 7);
  CHECK(cached.agreeing({0, 7, 10}) == 20);
  CHECK(cached.agreeing({0, 7, 9}) == 9);
  CHECK(cached.agreeing({0, 7, 15}) == 10);
  CHECK(cached.agreeing({0, 8, 10}) == 10);
}

void test_shortening_to_more_changes_nothing() {
  CachedPositions cached;
  cached.shorten(3);
  CHECK(cached.size() == 0);
  cached.lengthen(4, 7);
  cached.shorten(9);
  CHECK(cached.size() == 4);
}

void test_wide_models_compute_fewer_tokens_at_once() {
  const std::pair<int64_t, int64_t> tokens_of[] = {{1, 256},    {1536, 256}, {4096, 256},
                                                   {5632, 160}, {8192, 128}, {14336, 128}};
  for (const auto& [widest, tokens] : tokens_of) CHECK(tokens_of_run(widest) == tokens);
}

// Rounding may leave a crumb of the sum: it must not fall to a token that cannot be drawn.
void test_a_token_of_probability_zero_is_never_picked() {
  const Sampler::Candidate candidates[] = {
      {0.0F, 10}, {0.5F, 11}, {0.0F, 12}, {1.0F, 13}, {0.0F, 14}};
  const auto pick = [&](double left) { return Sampler::pick(candidates, 5, left); };
  CHECK(pick(0.0) == 11);
  CHECK(pick(0.499) == 11);
  CHECK(pick(0.5) == 13);
  CHECK(pick(1.5) == 13);
}

bool is_refused(const std::vector<float>& logits) {
  try {
    argmax(logits.data(), logits.size());
  } catch (const Error&) {
    return true;
  }
  return false;
}

// argmax goes strip by strip, 16 lanes at a time.
void test_the_first_of_the_largest_logits_is_found_wherever_it_is() {
  for (const size_t count : {1, 15, 16, 17, 1023, 1024, 1025, 1040, 3000}) {
    std::vector<float> logits(count, -7.0F);
    for (const size_t at : {size_t{0}, count / 2, count - 1}) {
      std::fill(logits.begin() + static_cast<std::ptrdiff_t>(at), logits.end(), -3.0F);
      CHECK(argmax(logits.data(), count) == at);
      for (const float odd : {std::nanf(""), HUGE_VALF}) {
        std::vector<float> damaged = logits;
        damaged[at] = odd;
        CHECK(is_refused(damaged));
      }
      std::fill(logits.begin(), logits.end(), -7.0F);
    }
    CHECK(is_refused(std::vector<float>(count, -HUGE_VALF)));
  }
}

std::string refusal(const Sampling& sampling) {
  try {
    sampling.check();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void test_a_penalty_that_would_overflow_is_refused_with_its_value() {
  Sampling sampling;
  for (const float penalty : {1e-6F, 1.0F, 1e6F}) {
    sampling.repetition_penalty = penalty;
    CHECK(refusal(sampling).empty());
  }
  for (const float penalty : {1e-39F, 1e-7F, 1e7F}) {
    sampling.repetition_penalty = penalty;
    CHECK(refusal(sampling).find("repetition_penalty is 1e") == 0);
  }
}

}  // namespace
}  // namespace edgelora::test

int main() {
  using namespace edgelora::test;
  test_the_first_of_the_largest_logits_is_found_wherever_it_is();
  test_cached_positions_know_who_computed_the_last_one();
  test_positions_agree_up_to_the_first_of_another_adapter();
  test_shortening_to_more_changes_nothing();
  test_wide_models_compute_fewer_tokens_at_once();
  test_a_token_of_probability_zero_is_never_picked();
  test_a_penalty_that_would_overflow_is_refused_with_its_value();
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
