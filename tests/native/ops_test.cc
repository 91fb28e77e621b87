// Linear's job with adapters on a thread pool of our own (no ONNX Runtime needed), against sums in
// double.
#include <cmath>
#include <random>
#include <thread>

#include "adapter_bytes.h"
#include "ops/linear_job.h"
#include "ops/operator.h"
#include "test_check.h"

namespace edgelora::test {
namespace {

using ops::AdapterCache;
using ops::RowAdapters;

constexpr int64_t kThreads = 3;

// ParallelFor as ONNX Runtime promises it: every index once, on any thread.
OrtStatus* parallel_for(const OrtKernelContext*, void (*body)(void*, size_t), size_t total, size_t,
                        void* data) noexcept {
  std::vector<std::thread> pool;
  for (size_t i = 1; i < total; ++i) pool.emplace_back(body, data, i);
  if (total > 0) body(data, 0);
  for (std::thread& thread : pool) thread.join();
  return nullptr;
}

OrtApi pool_api() {
  OrtApi api{};
  api.KernelContext_ParallelFor = parallel_for;
  return api;
}

std::vector<float> random_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// A Linear of three slices in `float`, so that only the order of sums differs from the reference.
struct Model {
  static constexpr int64_t k = 96;
  static constexpr int64_t n = 256 + 16 + 64;
  const std::vector<int64_t> slices{256, 16, 64};
  const std::vector<std::string> names{"q", "k", "v"};
  const std::vector<float> w = random_values(n * k, 1);  // [N, K]
  const std::vector<float> bias = random_values(n, 2);
  std::vector<float> packed = std::vector<float>(n * k);

  Model() {
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t i = 0; i < k; ++i) {
        packed[static_cast<size_t>((row / 16 * k + i) * 16 + row % 16)] =
            w[static_cast<size_t>(row * k + i)];
      }
    }
  }

  Targets targets() const { return {{"q", {k, 256}}, {"k", {k, 16}}, {"v", {k, 64}}}; }

  kernels::Weights weights() const {
    kernels::Weights weights{};
    weights.format = kernels::Format::kFloat;
    weights.in_features = k;
    weights.out_features = n;
    weights.codes = packed.data();
    weights.slices = slices.data();
    weights.slice_count = 3;
    return weights;
  }
};

// One target's factors, and the file they are written to.
struct Lora {
  int64_t slice;      // index
  int64_t first_row;  // of the slice in y
  int64_t rank;
  double scaling;
  std::vector<float> a, b;
};

Lora make_lora(const Model& model, int64_t slice, int64_t rank, unsigned seed) {
  const int64_t first = slice == 0 ? 0 : slice == 1 ? 256 : 272;
  const auto rows = static_cast<size_t>(model.slices[static_cast<size_t>(slice)] * rank);
  return {slice,
          first,
          rank,
          0.25 * seed,
          random_values(static_cast<size_t>(rank * Model::k), seed),
          random_values(rows, seed + 100)};
}

int64_t load(const TemporaryFolder& folder, const Model& model, const std::vector<Lora>& loras) {
  AdapterBytes file;
  for (const Lora& lora : loras) {
    file.target(model.names[static_cast<size_t>(lora.slice)], lora.rank, lora.a, lora.b,
                lora.scaling);
  }
  static std::atomic<int> count{0};  // a file that is mapped must not be written again
  const std::string path = folder.file(std::to_string(++count));
  write_file(path, file.bytes());
  return AdapterStore::instance().load(path, kBase, model.targets());
}

void add_reference(const Lora& lora, double weight, const float* x, double* y) {
  const int64_t rows = static_cast<int64_t>(lora.b.size()) / lora.rank;
  for (int64_t r = 0; r < lora.rank; ++r) {
    double t = 0;
    for (int64_t i = 0; i < Model::k; ++i) {
      t += double{lora.a[static_cast<size_t>(r * Model::k + i)]} * double{x[i]};
    }
    for (int64_t row = 0; row < rows; ++row) {
      y[lora.first_row + row] +=
          weight * lora.scaling * t * double{lora.b[static_cast<size_t>(row * lora.rank + r)]};
    }
  }
}

std::vector<float> run(const Model& model, AdapterCache& cache, const std::vector<int64_t>& ids,
                       int64_t sequence, const std::vector<float>& x) {
  const kernels::Weights weights = model.weights();
  RowAdapters rows;
  rows.resolve(cache, ids.data(), static_cast<int64_t>(ids.size()));
  ops::LinearCall call{};
  call.kernels = &selected_kernels();
  call.weights = &weights;
  call.exact = true;
  call.panels = Model::n / 16;
  call.bias = model.bias.data();
  call.x = x.data();
  call.rows = static_cast<int64_t>(ids.size()) * sequence;
  std::vector<float> y(static_cast<size_t>(call.rows * Model::n));
  call.y = y.data();
  call.sequence_length = sequence;
  call.adapters = &rows;
  call.threads = kThreads;
  const OrtApi api = pool_api();
  ops::LinearJob(call).run(api, nullptr);
  return y;
}

// What an id stands for.
struct Adapter {
  std::vector<std::pair<const Lora*, double>> terms;  // with weights
};

void check_rows(const Model& model, const std::vector<Adapter>& adapters, int64_t sequence,
                const std::vector<float>& x, const std::vector<float>& y) {
  double worst = 0;
  for (size_t m = 0; m < x.size() / Model::k; ++m) {
    const float* row = x.data() + m * Model::k;
    std::vector<double> expected(model.bias.begin(), model.bias.end());
    for (size_t n = 0; n < static_cast<size_t>(Model::n); ++n) {
      for (size_t i = 0; i < static_cast<size_t>(Model::k); ++i) {
        expected[n] += double{model.w[n * Model::k + i]} * double{row[i]};
      }
    }
    for (const auto& [lora, weight] : adapters[m / static_cast<size_t>(sequence)].terms) {
      add_reference(*lora, weight, row, expected.data());
    }
    for (size_t n = 0; n < static_cast<size_t>(Model::n); ++n) {
      worst = std::max(worst, std::abs(expected[n] - double{y[m * Model::n + n]}));
    }
  }
  // Values reach some thousands; sums of 96 and of up to 8 products, each within 2^-24 of its size.
  check(worst < 2e-2, __FILE__, __LINE__, "largest difference " + std::to_string(worst));
}

void test_linear_adds_each_sequence_its_own_adapter(const TemporaryFolder& folder) {
  const Model model;
  AdapterCache cache(model.names, model.slices, Model::k);
  const Lora q = make_lora(model, 0, 8, 3);
  const Lora k = make_lora(model, 1, 3, 4);
  const Lora v = make_lora(model, 2, 5, 5);
  const int64_t parts[] = {load(folder, model, {q, v}), load(folder, model, {k, v})};
  const float weights[] = {0.5F, -2.0F};
  const int64_t sum = AdapterStore::instance().compose(parts, weights, 2);
  const std::vector<int64_t> ids{0, parts[0], sum, parts[1], parts[0]};
  const Adapter first{{{&q, 1}, {&v, 1}}};
  const Adapter second{{{&k, 1}, {&v, 1}}};
  const Adapter both{{{&q, 0.5}, {&v, 0.5}, {&k, -2}, {&v, -2}}};
  const std::vector<Adapter> meaning{{}, first, both, second, first};
  for (const int64_t sequence : {1, 2, 9, 40}) {
    const auto x = random_values(ids.size() * static_cast<size_t>(sequence * Model::k), 6);
    for (int repeat = 0; repeat < 20; ++repeat) {
      check_rows(model, meaning, sequence, x, run(model, cache, ids, sequence, x));
    }
  }
}

void test_linear_leaves_the_base_alone_without_adapters() {
  const Model model;
  AdapterCache cache(model.names, model.slices, Model::k);
  const auto x = random_values(7 * Model::k, 7);
  check_rows(model, {{}}, 7, x, run(model, cache, {0}, 7, x));
}

std::string message_of(AdapterCache& cache, int64_t handle) {
  try {
    cache.find(handle);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void test_a_cached_adapter_is_gone_once_it_is_unloaded(const TemporaryFolder& folder) {
  const Model model;
  AdapterCache cache(model.names, model.slices, Model::k);
  const int64_t handle = load(folder, model, {make_lora(model, 0, 2, 3)});
  CHECK(cache.find(handle).node == cache.find(handle).node);
  const std::weak_ptr<const AdapterFile> file =
      AdapterStore::instance().find(handle)->terms[0].file;
  AdapterStore::instance().unload(handle);
  CHECK(file.expired());  // the cache keeps no memory
  CHECK(message_of(cache, handle) == "adapter handle " + std::to_string(handle) + " is not loaded");
}

void test_an_adapter_of_another_shape_is_refused(const TemporaryFolder& folder) {
  const Model model;
  AdapterCache cache({"q"}, {128}, Model::k);
  const int64_t handle = load(folder, model, {make_lora(model, 0, 2, 3)});
  CHECK(message_of(cache, handle).find("q: the adapter is for [256, 96]") == 0);
}

void test_runs_and_unloads_at_once(const TemporaryFolder& folder) {
  const Model model;
  AdapterCache cache(model.names, model.slices, Model::k);
  const Lora q = make_lora(model, 0, 4, 3);
  const auto x = random_values(Model::k, 8);
  std::atomic<int64_t> latest{load(folder, model, {q})};
  std::atomic<int> finished{0};
  const auto session = [&] {
    while (finished < 100) {
      try {
        check_rows(model, {{{{&q, 1}}}}, 1, x, run(model, cache, {latest}, 1, x));
        ++finished;
      } catch (const Error& error) {
        CHECK(error.status() == EDGELORA_NOT_FOUND);
      }
    }
  };
  std::vector<std::thread> sessions;
  for (int i = 0; i < 2; ++i) sessions.emplace_back(session);
  while (finished < 100) {
    const int64_t old = latest.exchange(load(folder, model, {q}));
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
  test_linear_leaves_the_base_alone_without_adapters();
  test_a_cached_adapter_is_gone_once_it_is_unloaded(folder);
  test_an_adapter_of_another_shape_is_refused(folder);
  test_runs_and_unloads_at_once(folder);
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
