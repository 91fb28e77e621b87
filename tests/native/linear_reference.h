// A Linear in memory, and what it must give: sums in double, and how far float32 may be from them.
//
// Weights are int8 codes times powers of two, so that both the float path and the int8 path have
// exactly the matrix that the reference multiplies.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "adapter_bytes.h"
#include "integer_kernels.h"
#include "ops/linear_job.h"
#include "test_check.h"

namespace edgelora::test {

constexpr double kEpsilon = 0x1p-24;

inline std::vector<float> random_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// What an adapter has for one slice.
struct Lora {
  size_t slice;  // index
  int64_t rank;  // 0: no factors
  double scaling;
  std::vector<float> a, b;         // [rank, K], [rows of the slice, rank]
  std::vector<float> rows, bias;  // [rows of the slice] or empty: row factors, bias
};

// What an adapter id stands for, with weights.
using Terms = std::vector<std::pair<const Lora*, double>>;

struct Expected {
  double value;
  double tolerance;
};

struct TestedLinear {
  std::vector<int64_t> slices;
  int64_t k;
  bool exact;  // else activations in int8, weights as int8 codes
  bool refined = false;
  int64_t n = 0;
  std::vector<std::string> names;
  std::vector<double> w;         // [N, K]
  std::vector<float> floats;     // packed [P, K, 16]
  std::vector<int8_t> codes;     // packed [P, Kp/4, 64]
  std::vector<uint16_t> scales;  // packed [P, Kp/32, 16]
  std::vector<float> bias, norm;  // empty: none
  float epsilon = 1e-5f;
  ops::Activation activation = ops::Activation::kNone;

  TestedLinear(std::vector<int64_t> the_slices, int64_t in_features, bool is_exact)
      : slices(std::move(the_slices)), k(in_features), exact(is_exact) {
    for (size_t i = 0; i < slices.size(); ++i) {
      names.push_back(std::string(1, static_cast<char>('a' + i)));
      n += slices[i];
    }
    fill();
  }

  int64_t blocks() const { return (k + 31) / 32; }
  int64_t columns() const { return activation == ops::Activation::kSwiGlu ? n / 2 : n; }
  int64_t first_row(size_t slice) const {
    int64_t row = 0;
    for (size_t i = 0; i < slice; ++i) row += slices[i];
    return row;
  }
  double at(int64_t row, int64_t column) const { return w[static_cast<size_t>(row * k + column)]; }

  void fill() {
    w.resize(static_cast<size_t>(n * k));
    const int64_t rows = (n + 15) / 16 * 16;
    floats.resize(static_cast<size_t>(rows * k));
    codes.resize(static_cast<size_t>(rows * blocks() * 32));
    scales.resize(static_cast<size_t>(rows * blocks()));
    std::mt19937 generator(static_cast<unsigned>(n + k));
    std::uniform_int_distribution<int> code(-128, 127);
    for (int64_t row = 0; row < n; ++row) {
      const int64_t p = row / 16, r = row % 16;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t b = i / 32, exponent = 6 + (row + b) % 3;
        const int value = code(generator);
        const double weight = std::ldexp(value, static_cast<int>(-exponent));
        w[static_cast<size_t>(row * k + i)] = weight;
        floats[static_cast<size_t>((p * k + i) * 16 + r)] = static_cast<float>(weight);
        codes[static_cast<size_t>((p * blocks() * 8 + i / 4) * 64 + 4 * r + i % 4)] =
            static_cast<int8_t>(value);
        scales[static_cast<size_t>((p * blocks() + b) * 16 + r)] =
            static_cast<uint16_t>((15 - exponent) << 10);  // 2^−exponent
      }
    }
  }

  kernels::Weights weights() const {
    kernels::Weights weights{};
    weights.format = exact ? kernels::Format::kFloat : kernels::Format::kInt8;
    weights.in_features = k;
    weights.out_features = n;
    weights.block_size = 32;
    weights.codes = exact ? static_cast<const void*>(floats.data()) : codes.data();
    weights.scales = exact ? nullptr : scales.data();
    weights.slices = slices.data();
    weights.slice_count = static_cast<int64_t>(slices.size());
    return weights;
  }

  ops::LinearNode node() const {
    ops::LinearNode node;
    node.norm = norm.empty() ? nullptr : norm.data();
    node.epsilon = epsilon;
    node.bias = bias.empty() ? nullptr : bias.data();
    node.activation = activation;
    node.refined = refined;
    return node;
  }

  ops::AdapterCache cache() const { return {names, slices, k}; }

  Lora lora(size_t slice, int64_t rank, unsigned seed) const {
    return {slice, rank, 0.25 * seed, random_values(static_cast<size_t>(rank * k), seed),
            random_values(static_cast<size_t>(rank * slices[slice]), seed + 100), {}, {}};
  }

  // With row factors and a bias, or without factors with a bias alone.
  Lora lora_with_rows(size_t slice, int64_t rank, unsigned seed) const {
    Lora lora = this->lora(slice, rank, seed);
    const auto rows = static_cast<size_t>(slices[slice]);
    if (rank > 0) lora.rows = random_values(rows, seed + 200);
    lora.bias = random_values(rows, seed + 300);
    return lora;
  }

  // Writes an adapter of these factors and loads it; the handle.
  int64_t load(const TemporaryFolder& folder, const std::vector<const Lora*>& loras) const {
    AdapterBytes file;
    for (const Lora* lora : loras) {
      const std::string& name = names[lora->slice];
      if (lora->rank > 0) file.target(name, lora->rank, lora->a, lora->b, lora->scaling);
      if (lora->rank == 0) file.scaling(name, 1);
      if (!lora->rows.empty()) file.tensor(name + ".row_factor", {slices[lora->slice]}, lora->rows);
      if (!lora->bias.empty()) file.tensor(name + ".bias", {slices[lora->slice]}, lora->bias);
    }
    static std::atomic<int> count{0};  // a file that is mapped must not be written again
    const std::string path = folder.file(std::to_string(++count));
    write_file(path, file.bytes());
    Targets targets;
    for (size_t i = 0; i < slices.size(); ++i) targets[names[i]] = {k, slices[i]};
    return AdapterStore::instance().load(path, kBase, targets, PrefixShape{});
  }
};

// n = x, or its RMS norm.
inline std::vector<double> normed_row(const TestedLinear& linear, const float* x) {
  std::vector<double> row(x, x + linear.k);
  if (linear.norm.empty()) return row;
  double squares = 0;
  for (const double value : row) squares += value * value;
  const double mean = squares / static_cast<double>(linear.k);
  const double inverse = 1 / std::sqrt(mean + double{linear.epsilon});
  for (size_t i = 0; i < row.size(); ++i) row[i] *= inverse * double{linear.norm[i]};
  return row;
}

// n as the products see it, and by how much a value may differ: a whole step where a hair decides
// between two codes.
struct Rounded {
  std::vector<double> values;
  std::vector<double> steps;
};

inline double largest_magnitude(const std::vector<double>& row, size_t begin, size_t count) {
  double most = 0;
  for (size_t i = begin; i < std::min(row.size(), begin + count); ++i) {
    most = std::max(most, std::abs(row[i]));
  }
  return most;
}

// Of the block of 32 that begins there, and whether a hair more would double it.
struct Step {
  double size;
  bool doubtful;
};

inline Step step_of(const std::vector<double>& row, size_t block, double hair) {
  const double most = largest_magnitude(row, block, 32);
  if (integer_kernels().quantize_groups == nullptr || most == 0) return {most / 127, false};
  double top = largest_magnitude(row, block / 128 * 128, 128);
  for (int i = 0; i < 5 && top / 2 >= most; ++i) top /= 2;
  return {top / 127, top < 2 * most && top / 2 >= most * (1 - hair) && top != most};
}

inline Rounded rounded_row(const TestedLinear& linear, const std::vector<double>& row) {
  Rounded rounded{row, std::vector<double>(row.size(), 0.0)};
  if (linear.exact) return rounded;
  const double hair = 127 * static_cast<double>(linear.k + 16) * kEpsilon;
  const bool refined = linear.refined && integer_kernels().quantize_groups != nullptr;
  for (size_t begin = 0; begin < row.size(); begin += 32) {
    const Step step = step_of(row, begin, hair);
    for (size_t i = begin; i < std::min(row.size(), begin + 32) && step.size > 0; ++i) {
      if (refined) {  // what is left is half a step at most, rounded in steps of its own
        rounded.steps[i] = step.size / 127;
        continue;
      }
      const double code = row[i] / step.size;
      rounded.values[i] = std::nearbyint(code) * step.size;
      const double to_tie = std::abs(std::abs(code - std::nearbyint(code)) - 0.5);
      if (to_tie <= hair || step.doubtful) rounded.steps[i] = step.size;
    }
  }
  return rounded;
}

// Of each row of W·n, by all terms together.
inline std::vector<double> row_factors(const TestedLinear& linear, const Terms& terms) {
  std::vector<double> factors(static_cast<size_t>(linear.n), 1.0);
  for (const auto& [lora, weight] : terms) {
    const auto first = static_cast<size_t>(linear.first_row(lora->slice));
    for (size_t i = 0; i < lora->rows.size(); ++i) {
      factors[first + i] += weight * (double{lora->rows[i]} - 1);
    }
  }
  return factors;
}

// Row factors ⊙ W·n + adapters + bias.
inline std::vector<Expected> product_row(const TestedLinear& linear, const Terms& terms,
                                         const std::vector<double>& row) {
  const Rounded rounded = rounded_row(linear, row);
  std::vector<Expected> z(static_cast<size_t>(linear.n));
  std::vector<double> sizes(z.size());
  const std::vector<double> factors = row_factors(linear, terms);
  for (int64_t i = 0; i < linear.n; ++i) {
    const auto at = static_cast<size_t>(i);
    for (size_t j = 0; j < row.size(); ++j) {
      const double weight = factors[at] * linear.at(i, static_cast<int64_t>(j));
      z[at].value += weight * rounded.values[j];
      z[at].tolerance += std::abs(weight) * rounded.steps[j];
      sizes[at] += std::abs(weight * row[j]);
    }
    if (linear.bias.empty()) continue;
    z[at].value += double{linear.bias[at]};
    sizes[at] += std::abs(double{linear.bias[at]});
  }
  for (const auto& [lora, weight] : terms) {
    const auto first = static_cast<size_t>(linear.first_row(lora->slice));
    const auto rank = static_cast<size_t>(lora->rank);
    for (size_t i = 0; i < lora->bias.size(); ++i) {
      z[first + i].value += weight * double{lora->bias[i]};
      sizes[first + i] += std::abs(weight * double{lora->bias[i]});
    }
    for (size_t r = 0; r < rank; ++r) {
      double t = 0, size = 0;
      for (size_t j = 0; j < row.size(); ++j) {
        const double product = double{lora->a[r * row.size() + j]} * row[j];
        t += product;
        size += std::abs(product);
      }
      for (size_t i = 0; i < lora->b.size() / rank; ++i) {
        const double factor = weight * lora->scaling * double{lora->b[i * rank + r]};
        z[first + i].value += factor * t;
        sizes[first + i] += std::abs(factor) * size;
      }
    }
  }
  // A product passes through at most K sums of a dot product, half as many of the norm (the root
  // halves them), the ranks of all terms (8 in these tests), and a handful of scalings.
  const double roundings = static_cast<double>(2 * linear.k + 8 + 24);
  for (size_t i = 0; i < z.size(); ++i) z[i].tolerance += roundings * kEpsilon * sizes[i];
  return z;
}

inline std::vector<Expected> expected_row(const TestedLinear& linear, const Terms& terms,
                                          const float* x, const float* residual) {
  std::vector<Expected> y = product_row(linear, terms, normed_row(linear, x));
  const auto columns = static_cast<size_t>(linear.columns());
  if (linear.activation == ops::Activation::kSwiGlu) {
    for (size_t i = 0; i < columns; ++i) {
      const Expected gate = y[i], up = y[columns + i];
      const double silu = gate.value / (1 + std::exp(-gate.value));
      y[i].value = silu * up.value;
      y[i].tolerance = std::abs(silu) * up.tolerance +  // |silu′| ≤ 1.1
                       1.1 * gate.tolerance * (std::abs(up.value) + up.tolerance) +
                       8 * kEpsilon * std::abs(y[i].value) + 1e-35;
    }
    y.resize(columns);
  }
  for (size_t i = 0; residual != nullptr && i < columns; ++i) {
    y[i].value += double{residual[i]};
    y[i].tolerance += kEpsilon * std::abs(y[i].value) * 2;
  }
  return y;
}

// One call's inputs.
struct LinearInputs {
  std::vector<int64_t> ids;  // [batch]
  std::vector<Terms> terms;  // what each id stands for
  int64_t sequence;
  std::vector<float> x;         // [batch · sequence, K]
  std::vector<float> residual;  // [batch · sequence, columns] or empty
};

inline std::vector<float> run_linear(const TestedLinear& linear, ops::AdapterCache& cache,
                                     const LinearInputs& in, ops::Crews* crews) {
  const kernels::Weights weights = linear.weights();
  ops::RowAdapters rows;
  rows.resolve(cache, in.ids.data(), static_cast<int64_t>(in.ids.size()));
  ops::LinearCall call{};
  call.kernels = &integer_kernels();
  call.weights = &weights;
  call.node = linear.node();
  call.exact = linear.exact;
  call.panels = (linear.n + 15) / 16;
  call.x = in.x.data();
  call.residual = in.residual.empty() ? nullptr : in.residual.data();
  call.rows = static_cast<int64_t>(in.ids.size()) * in.sequence;
  std::vector<float> y(static_cast<size_t>(call.rows * linear.columns()), NAN);
  call.y = y.data();
  call.sequence_length = in.sequence;
  call.adapters = &rows;
  call.threads = crews->threads();
  ops::LinearJob(call).run(crews);
  return y;
}

inline std::vector<Expected> expected_rows(const TestedLinear& linear, const LinearInputs& in) {
  std::vector<Expected> all;
  for (size_t m = 0; m < in.ids.size() * static_cast<size_t>(in.sequence); ++m) {
    const size_t first = m * static_cast<size_t>(linear.columns());
    const float* residual = in.residual.empty() ? nullptr : in.residual.data() + first;
    const auto row = expected_row(linear, in.terms[m / static_cast<size_t>(in.sequence)],
                                  in.x.data() + m * static_cast<size_t>(linear.k), residual);
    all.insert(all.end(), row.begin(), row.end());
  }
  return all;
}

// Every element.
inline void check_rows(const std::vector<Expected>& expected, const std::vector<float>& y,
                       const std::string& what) {
  CHECK(expected.size() == y.size());
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    if (std::abs(expected[i].value - double{y[i]}) <= expected[i].tolerance) continue;
    if (wrong++ == 0) first = i;
  }
  check(wrong == 0, __FILE__, __LINE__,
        what + ": " + std::to_string(wrong) + " of " + std::to_string(y.size()) +
            ", the first at " + std::to_string(first) + ": " + std::to_string(y[first]) + ", not " +
            std::to_string(expected[first].value) + " ± " +
            std::to_string(expected[first].tolerance));
}

}  // namespace edgelora::test
