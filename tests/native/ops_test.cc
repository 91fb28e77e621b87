// Linear's job with adapters that come and go (no ONNX Runtime needed), against sums in double.
#include <thread>

#include "linear_reference.h"
#include "ops/operator.h"

namespace edgelora::test {
namespace {

ops::Crews& crews() {
  static ops::Crews three(3, true);
  return three;
}

TestedLinear qkv() {
  TestedLinear linear({256, 16, 64}, 96, true);
  linear.bias = random_values(static_cast<size_t>(linear.n), 2);
  return linear;
}

LinearInputs inputs(const TestedLinear& linear, std::vector<int64_t> ids, std::vector<Terms> terms,
                    int64_t sequence) {
  const auto values = ids.size() * static_cast<size_t>(sequence * linear.k);
  return {std::move(ids), std::move(terms), sequence, random_values(values, 6), {}};
}

void test_linear_adds_each_sequence_its_own_adapter(const TemporaryFolder& folder) {
  const TestedLinear linear = qkv();
  ops::AdapterCache cache = linear.cache();
  const Lora q = linear.lora(0, 8, 3), k = linear.lora(1, 3, 4), v = linear.lora(2, 5, 5);
  const int64_t parts[] = {linear.load(folder, {&q, &v}), linear.load(folder, {&k, &v})};
  const float weights[] = {0.5F, -2.0F};
  const int64_t sum = AdapterStore::instance().compose(parts, weights, 2);
  const Terms first{{&q, 1}, {&v, 1}}, second{{&k, 1}, {&v, 1}};
  const Terms both{{&q, 0.5}, {&v, 0.5}, {&k, -2}, {&v, -2}};
  for (const int64_t sequence : {1, 2, 9, 40}) {
    const LinearInputs in = inputs(linear, {0, parts[0], sum, parts[1], parts[0]},
                                   {{}, first, both, second, first}, sequence);
    const std::vector<Expected> expected = expected_rows(linear, in);
    for (int repeat = 0; repeat < 20; ++repeat) {
      check_rows(expected, run_linear(linear, cache, in, &crews()),
                 "sequence " + std::to_string(sequence));
    }
  }
}

void test_linear_scales_rows_and_adds_biases_of_each_sequence_s_own(const TemporaryFolder& folder,
                                                                   bool exact) {
  TestedLinear linear({256, 16, 64}, 96, exact);
  linear.bias = random_values(static_cast<size_t>(linear.n), 2);
  ops::AdapterCache cache = linear.cache();
  const Lora q = linear.lora_with_rows(0, 8, 3), k = linear.lora_with_rows(1, 0, 4);
  const Lora v = linear.lora(2, 5, 5);
  Lora factors = linear.lora(2, 0, 6);
  factors.rows = random_values(64, 7);
  const int64_t parts[] = {linear.load(folder, {&q, &v}), linear.load(folder, {&k}),
                           linear.load(folder, {&q, &k}), linear.load(folder, {&factors})};
  const float weights[] = {0.5F, -2.0F, 0.25F};
  const int64_t sum = AdapterStore::instance().compose(parts, weights, 3);
  const Terms first{{&q, 1}, {&v, 1}}, alone{{&k, 1}};
  const Terms all{{&q, 0.5}, {&v, 0.5}, {&k, -2}, {&q, 0.25}, {&k, 0.25}};
  for (const int64_t sequence : {1, 2, 9, 40}) {
    const LinearInputs mixed = inputs(linear, {0, parts[0], sum, parts[1], parts[0]},
                                      {{}, first, all, alone, first}, sequence);
    const LinearInputs bias_alone = inputs(linear, {parts[1]}, {alone}, sequence);
    const LinearInputs factors_alone = inputs(linear, {parts[3]}, {{{&factors, 1}}}, sequence);
    for (const LinearInputs& in : {mixed, bias_alone, factors_alone}) {
      check_rows(expected_rows(linear, in), run_linear(linear, cache, in, &crews()),
                 "rows, sequence " + std::to_string(sequence));
    }
  }
}

void test_linear_leaves_the_base_alone_without_adapters() {
  const TestedLinear linear = qkv();
  ops::AdapterCache cache = linear.cache();
  const LinearInputs in = inputs(linear, {0}, {{}}, 7);
  check_rows(expected_rows(linear, in), run_linear(linear, cache, in, &crews()), "base");
}

std::string message_of(ops::AdapterCache& cache, int64_t handle) {
  try {
    cache.find(handle);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void test_a_cached_adapter_is_gone_once_it_is_unloaded(const TemporaryFolder& folder) {
  const TestedLinear linear = qkv();
  ops::AdapterCache cache = linear.cache();
  const Lora q = linear.lora_with_rows(0, 2, 3);
  const int64_t handle = linear.load(folder, {&q});
  CHECK(cache.find(handle).node == cache.find(handle).node);
  CHECK(!cache.find(handle).node->rows[0]->bias.empty());
  const std::weak_ptr<const ActiveAdapter> adapter = AdapterStore::instance().find(handle);
  const std::weak_ptr<const AdapterFile> file = adapter.lock()->terms[0].file;
  AdapterStore::instance().unload(handle);
  CHECK(adapter.expired() && file.expired());  // the cache keeps no memory
  CHECK(message_of(cache, handle) == "adapter handle " + std::to_string(handle) + " is not loaded");
}

void test_a_batch_that_cannot_be_resolved_keeps_no_adapter(const TemporaryFolder& folder) {
  const TestedLinear linear = qkv();
  ops::AdapterCache cache = linear.cache();
  const Lora q = linear.lora(0, 2, 3);
  const int64_t ids[] = {linear.load(folder, {&q}), 7'000'000};
  const std::weak_ptr<const ActiveAdapter> adapter = AdapterStore::instance().find(ids[0]);
  ops::RowAdapters rows;
  std::string message;
  try {
    rows.resolve(cache, ids, 2);
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(message == "adapter handle 7000000 is not loaded");
  AdapterStore::instance().unload(ids[0]);
  CHECK(adapter.expired());
}

void test_an_adapter_of_another_shape_is_refused(const TemporaryFolder& folder) {
  const TestedLinear linear = qkv();
  ops::AdapterCache cache({linear.names[0]}, {128}, linear.k);
  const Lora q = linear.lora(0, 2, 3);
  const int64_t handle = linear.load(folder, {&q});
  CHECK(message_of(cache, handle).find("a: the adapter is for [256, 96]") == 0);
}

void test_runs_and_unloads_at_once(const TemporaryFolder& folder) {
  const TestedLinear linear = qkv();
  ops::AdapterCache cache = linear.cache();
  const Lora q = linear.lora(0, 4, 3);
  std::atomic<int64_t> latest{linear.load(folder, {&q})};
  std::atomic<int> finished{0};
  LinearInputs in = inputs(linear, {0}, {{{&q, 1}}}, 5);
  const std::vector<Expected> expected = expected_rows(linear, in);
  const auto session = [&] {
    LinearInputs mine = in;
    while (finished < 100) {
      try {
        mine.ids[0] = latest;
        check_rows(expected, run_linear(linear, cache, mine, &crews()), "while others unload");
        ++finished;
      } catch (const Error& error) {
        CHECK(error.status() == EDGELORA_NOT_FOUND);
      }
    }
  };
  std::vector<std::thread> sessions;
  for (int i = 0; i < 2; ++i) sessions.emplace_back(session);
  while (finished < 100) {
    const int64_t old = latest.exchange(linear.load(folder, {&q}));
    AdapterStore::instance().unload(old);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  for (std::thread& thread : sessions) thread.join();
}

}  // namespace
}  // namespace edgelora::test

int main() {
  using namespace edgelora::test;
  const TemporaryFolder folder;
  test_linear_adds_each_sequence_its_own_adapter(folder);
  for (const bool exact : {true, false}) {
    test_linear_scales_rows_and_adds_biases_of_each_sequence_s_own(folder, exact);
  }
  test_linear_leaves_the_base_alone_without_adapters();
  test_a_cached_adapter_is_gone_once_it_is_unloaded(folder);
  test_a_batch_that_cannot_be_resolved_keeps_no_adapter(folder);
  test_an_adapter_of_another_shape_is_refused(folder);
  test_runs_and_unloads_at_once(folder);
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
