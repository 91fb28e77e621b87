// Attention's job on 1 to 4 threads: tiles, appending and parts of a long context, against sums in
// double. What it computes in detail is compared with numpy in tests/test_attention.py.
#include "ops/attention_job.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "integer_kernels.h"
#include "sample.h"
#include "test_check.h"

namespace edgelora::test {
namespace {

constexpr double kEpsilon = 0x1p-24;
constexpr int64_t kHeads = 6, kKvHeads = 2, kHeadDim = 48, kPositions = 2048;
constexpr int64_t kGroup = kHeads / kKvHeads, kHalf = kHeadDim / 2;
constexpr int64_t kWidth = (kHeads + 2 * kKvHeads) * kHeadDim;

size_t at(int64_t index) { return static_cast<size_t>(index); }

std::vector<float> random_values(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(at(count));
  for (float& value : values) value = normal(generator);
  return values;
}

struct Tables {
  std::vector<float> cos, sin;
  Tables() {
    for (int64_t p = 0; p < kPositions; ++p) {
      for (int64_t i = 0; i < kHalf; ++i) {
        const double exponent = -static_cast<double>(i) / static_cast<double>(kHalf);
        const double angle = static_cast<double>(p) * std::pow(10000.0, exponent);
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }
};

// Every key and value of a sequence in double, as the kv_cache should have them.
struct Sequence {
  std::vector<double> keys, values;  // [positions, KV, D]
};

struct Decoding {
  Tables tables;
  ops::AttentionNode node{};
  ops::KvLayout layout;
  int64_t batch, capacity;
  std::vector<uint8_t> keys, values;
  std::vector<Sequence> sequences;
  std::vector<int64_t> past;

  Decoding(bool exact, int64_t window, int64_t the_batch, int64_t the_capacity)
      : layout(kHeadDim, exact), batch(the_batch), capacity(the_capacity) {
    node.heads = kHeads;
    node.kv_heads = kKvHeads;
    node.head_dim = kHeadDim;
    node.window = window;
    node.cos = tables.cos.data();
    node.sin = tables.sin.data();
    node.positions = kPositions;
    keys.assign(at(batch * kKvHeads * capacity * layout.key_row_bytes()), 0xff);
    values.assign(at(batch * kKvHeads * capacity * layout.value_row_bytes()), 0xff);
    sequences.resize(at(batch));
    past.assign(at(batch), 0);
  }

  std::vector<double> rotated(const float* head, int64_t position) const {
    std::vector<double> out(at(kHeadDim));
    for (int64_t i = 0; i < kHalf; ++i) {
      const double cos = double{tables.cos[at(position * kHalf + i)]};
      const double sin = double{tables.sin[at(position * kHalf + i)]};
      const double a = double{head[i]}, b = double{head[kHalf + i]};
      out[at(i)] = a * cos - b * sin;
      out[at(kHalf + i)] = b * cos + a * sin;
    }
    return out;
  }

  std::vector<float> run(const std::vector<float>& qkv, int64_t count, ops::Crews* crews,
                         int64_t first_query = 0) {
    ops::AttentionCall call{};
    call.kernels = &integer_kernels();
    call.node = &node;
    call.layout = layout;
    call.q = {qkv.data(), kWidth};
    call.k = {qkv.data() + kHeads * kHeadDim, kWidth};
    call.v = {call.k.data + kKvHeads * kHeadDim, kWidth};
    std::vector<float> y(at(batch * count * kHeads * kHeadDim), NAN);
    call.y = y.data();
    call.batch = batch;
    call.sequence = count;
    call.first_query = first_query;
    call.past = past.data();
    call.keys = keys.data();
    call.values = values.data();
    call.capacity = capacity;
    call.threads = crews->threads();
    ops::AttentionJob(call).run(crews);
    return y;
  }

  void remember(const std::vector<float>& qkv, int64_t count) {
    for (int64_t s = 0; s < batch; ++s) {
      Sequence& sequence = sequences[at(s)];
      sequence.keys.resize(at(past[at(s)] * kKvHeads * kHeadDim));
      sequence.values.resize(sequence.keys.size());
      for (int64_t i = 0; i < count; ++i) {
        const float* k = qkv.data() + (s * count + i) * kWidth + kHeads * kHeadDim;
        for (int64_t h = 0; h < kKvHeads; ++h) {
          const std::vector<double> key = rotated(k + h * kHeadDim, past[at(s)] + i);
          sequence.keys.insert(sequence.keys.end(), key.begin(), key.end());
        }
        const float* v = k + kKvHeads * kHeadDim;
        sequence.values.insert(sequence.values.end(), v, v + kKvHeads * kHeadDim);
      }
    }
  }

  // One row of one head.
  void check_head(int64_t s, int64_t head, const std::vector<double>& q, int64_t position,
                  const float* y, const std::string& what) const {
    const Sequence& sequence = sequences[at(s)];
    const int64_t oldest = node.window < 0 ? 0 : std::max<int64_t>(0, position + 1 - node.window);
    std::vector<double> scores;
    double most = -HUGE_VAL, doubt = 0;
    for (int64_t p = oldest; p <= position; ++p) {
      double score = 0, size = 0;
      for (int64_t i = 0; i < kHeadDim; ++i) {
        const int64_t row = (p * kKvHeads + head / kGroup) * kHeadDim;
        const double product = q[at(i)] * sequence.keys[at(row + i)];
        score += product;
        size += std::abs(product);
      }
      const double root = std::sqrt(static_cast<double>(kHeadDim));
      scores.push_back(score / root);
      most = std::max(most, scores.back());
      // rotations of both, 1/√D, and a sum of D products
      doubt = std::max(doubt, (kHeadDim + 16) * kEpsilon * size / root);
    }
    double sum = 0, span = 0;
    std::vector<double> out(at(kHeadDim)), size(at(kHeadDim));
    for (int64_t p = oldest; p <= position; ++p) {
      const double weight = std::exp(scores[at(p - oldest)] - most);
      sum += weight;
      span = std::max(span, most - scores[at(p - oldest)]);
      for (int64_t i = 0; i < kHeadDim; ++i) {
        const double value = sequence.values[at((p * kKvHeads + head / kGroup) * kHeadDim + i)];
        out[at(i)] += weight * value;
        size[at(i)] += weight * std::abs(value);
      }
    }
    // Two scores' doubts; a chunk's sum of 256, and two exponentials for each of at most 24 chunks
    // and parts.
    const double relative = 2 * doubt + 2 * (span + 8) * kEpsilon * 24 + 2 * (256 + 48) * kEpsilon;
    for (int64_t i = 0; i < kHeadDim; ++i) {
      const double expected = out[at(i)] / sum;
      const double tolerance = 2 * relative * size[at(i)] / sum;
      check(std::abs(double{y[i]} - expected) <= tolerance, __FILE__, __LINE__,
            what + ", head " + std::to_string(head) + ", position " + std::to_string(position) +
                ": " + std::to_string(y[i]) + ", not " + std::to_string(expected));
    }
  }

  void check_rows(const std::vector<float>& qkv, int64_t count, const std::vector<float>& y,
                  const std::string& what) const {
    for (int64_t m = 0; m < batch * count; ++m) {
      const int64_t s = m / count, position = past[at(s)] + m % count;
      for (int64_t h = 0; h < kHeads; ++h) {
        const std::vector<double> q = rotated(qkv.data() + m * kWidth + h * kHeadDim, position);
        check_head(s, h, q, position, y.data() + (m * kHeads + h) * kHeadDim, what);
      }
    }
  }
};

// Prefill in chunks, then decode; sequences of other lengths from the second call on.
void test_exact_attention_equals_sums_in_double(int64_t threads, int64_t window) {
  ops::Crews crews(threads, true);
  Decoding decoding(true, window, 2, 1216);
  unsigned seed = 1;
  for (const int64_t count : {70, 1, 33, 500, 1, 500, 1, 3}) {
    const auto qkv = random_values(2 * count * kWidth, ++seed);
    const std::vector<float> y = decoding.run(qkv, count, &crews);
    decoding.remember(qkv, count);
    const std::string what = "threads " + std::to_string(threads) + ", window " +
                             std::to_string(window) + ", rows " + std::to_string(count);
    if (count < 500 || (threads == 4 && window == 600)) decoding.check_rows(qkv, count, y, what);
    decoding.past[0] += count;
    decoding.past[1] += seed == 2 ? count / 2 : count;  // as if the rest were padding
  }
}

// Threads change how rows are spread, never a kv_cache, and a result only by its parts' order.
void test_int8_attention_is_the_same_on_any_number_of_threads() {
  ops::Crews alone(1, true);
  for (int64_t threads = 2; threads <= 4; ++threads) {
    ops::Crews crews(threads, true);
    Decoding one(false, -1, 2, 1216), many(false, -1, 2, 1216);
    unsigned seed = 1;
    for (const int64_t count : {70, 1, 500, 530, 1, 2}) {
      const auto qkv = random_values(2 * count * kWidth, ++seed);
      const std::vector<float> expected = one.run(qkv, count, &alone);
      const std::vector<float> y = many.run(qkv, count, &crews);
      CHECK(one.keys == many.keys);
      CHECK(one.values == many.values);
      double worst = 0;
      for (size_t i = 0; i < y.size(); ++i) {
        worst = std::max(worst, std::abs(double{y[i]} - double{expected[i]}));
      }
      // Scores are equal to the bit; a weight is relative to another largest one, and may so fall
      // on the other side of a half: one step in 127 of a block's largest, times values below 5.
      CHECK(worst <= 5.0 / 127);
      CHECK(std::none_of(y.begin(), y.end(), [](float value) { return std::isnan(value); }));
      for (int64_t s = 0; s < 2; ++s) {
        one.past[at(s)] += count;
        many.past[at(s)] += count;
      }
    }
  }
}

// The kv_cache gets every position; what others computed lies in y untouched.
void test_rows_before_the_first_query_are_only_appended(int64_t threads) {
  ops::Crews crews(threads, true);
  Decoding all(false, -1, 2, 1216), some(false, -1, 2, 1216);
  unsigned seed = 1;
  for (const int64_t count : {70, 1, 500, 2}) {
    for (const int64_t first : {count, count - 1, count / 2}) {
      const auto qkv = random_values(2 * count * kWidth, ++seed);
      const std::vector<float> expected = all.run(qkv, count, &crews);
      const std::vector<float> y = some.run(qkv, count, &crews, first);
      CHECK(all.keys == some.keys);
      CHECK(all.values == some.values);
      const int64_t width = kHeads * kHeadDim;
      for (int64_t i = 0; i < 2 * count * width; ++i) {
        const bool asked = i / width % count >= first;
        // As above: a step of 127 where the context is split into other parts.
        const double difference = std::abs(double{y[at(i)]} - double{expected[at(i)]});
        CHECK(asked ? difference <= 5.0 / 127 : std::isnan(y[at(i)]));
      }
    }
    for (int64_t s = 0; s < 2; ++s) all.past[at(s)] = some.past[at(s)] += count;
  }
}

}  // namespace
}  // namespace edgelora::test

int main() {
  using namespace edgelora::test;
  size_t turn = 0;
  for (int64_t threads = 1; threads <= 4; ++threads) {
    for (const int64_t window : {-1, 40, 600}) {
      if (left_out(&turn)) continue;
      test_exact_attention_equals_sums_in_double(threads, window);
    }
  }
  test_int8_attention_is_the_same_on_any_number_of_threads();
  for (int64_t threads = 1; threads <= 4; ++threads) {
    if (left_out(&turn)) continue;
    test_rows_before_the_first_query_are_only_appended(threads);
  }
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
