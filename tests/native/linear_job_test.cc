// What Linear fuses: RMS norm, side branch, bias, SwiGLU, residual; for many rows, 1 to 4 threads,
// the exact path and the int8 path. Every element against sums in double.
#include "linear_reference.h"
#include "sample.h"

namespace edgelora::test {
namespace {

// What a node has of all that it can have.
struct Parts {
  const char* name;
  bool norm, bias, swiglu, residual, adapters, refined = false;
};

constexpr Parts kParts[] = {
    {"plain", false, false, false, false, false},
    {"norm", true, false, false, false, false},
    {"residual", false, false, false, true, false},
    {"bias, residual, adapters", false, true, false, true, true},
    {"swiglu", false, false, true, false, false},
    {"norm, swiglu, adapters", true, false, true, false, true},
    {"everything", true, true, true, true, true},
    {"refined", true, false, false, false, false, true},
    {"everything, refined", true, true, true, true, true, true},
};

struct Rows {
  size_t batch;
  int64_t sequence;
};
// 1, 2, 63, 64, 65, 130
constexpr Rows kRows[] = {{1, 1}, {2, 1}, {3, 21}, {2, 32}, {5, 13}, {2, 65}};

// Enough weights for four threads even with one row; K is no multiple of a block.
TestedLinear gate_up(const Parts& parts, bool exact) {
  TestedLinear linear({704, 704}, 100, exact);
  if (parts.norm) linear.norm = random_values(static_cast<size_t>(linear.k), 11);
  if (parts.bias) linear.bias = random_values(static_cast<size_t>(linear.n), 12);
  linear.refined = parts.refined;
  if (parts.swiglu) linear.activation = ops::Activation::kSwiGlu;
  return linear;
}

// Adapters on gate alone, on both, and a sum of the two.
struct Adapters {
  Lora gate, up, more;
  std::vector<int64_t> ids;
  std::vector<Terms> terms;

  Adapters(const TestedLinear& linear, const TemporaryFolder& folder)
      : gate(linear.lora(0, 4, 3)), up(linear.lora(1, 3, 4)), more(linear.lora(0, 1, 5)) {
    const int64_t parts[] = {linear.load(folder, {&gate}), linear.load(folder, {&more, &up})};
    const float weights[] = {0.5F, -1.5F};
    const int64_t sum = AdapterStore::instance().compose(parts, weights, 2);
    ids = {parts[1], 0, sum, parts[0]};
    terms = {{{&more, 1}, {&up, 1}}, {}, {{&gate, 0.5}, {&more, -1.5}, {&up, -1.5}}, {{&gate, 1}}};
  }
};

LinearInputs inputs(const TestedLinear& linear, const Parts& parts, const Rows& rows,
                    const Adapters& adapters) {
  LinearInputs in;
  for (size_t i = 0; i < rows.batch; ++i) {
    in.ids.push_back(parts.adapters ? adapters.ids[i % 4] : 0);
    in.terms.push_back(parts.adapters ? adapters.terms[i % 4] : Terms{});
  }
  in.sequence = rows.sequence;
  const size_t count = rows.batch * static_cast<size_t>(rows.sequence);
  in.x = random_values(count * static_cast<size_t>(linear.k), 21);
  if (!parts.residual) return in;
  in.residual = random_values(count * static_cast<size_t>(linear.columns()), 22);
  return in;
}

void test_linear_equals_sums_in_double(const TemporaryFolder& folder, const Parts& parts,
                                       bool exact, size_t* turn) {
  const TestedLinear linear = gate_up(parts, exact);
  ops::AdapterCache cache = linear.cache();
  const Adapters adapters(linear, folder);
  for (const Rows& rows : kRows) {
    if (left_out(turn)) continue;
    const LinearInputs in = inputs(linear, parts, rows, adapters);
    const std::vector<Expected> expected = expected_rows(linear, in);
    for (int64_t threads = 1; threads <= 4; ++threads) {
      ops::Crews crews(threads, true);
      const std::string what = std::string(parts.name) + (exact ? ", exact" : ", int8") +
                               ", rows " + std::to_string(in.ids.size()) + " × " +
                               std::to_string(in.sequence) + ", threads " +
                               std::to_string(threads);
      for (int repeat = 0; repeat < 3; ++repeat) {
        check_rows(expected, run_linear(linear, cache, in, &crews), what);
      }
    }
  }
}

// A range of panels may begin and end anywhere, and a last one may be partial.
void test_linear_of_any_width_equals_sums_in_double(bool exact) {
  for (const int64_t n : {1, 16, 37, 48, 1391}) {
    TestedLinear linear({n}, 96, exact);
    linear.norm = random_values(96, 11);
    ops::AdapterCache cache = linear.cache();
    ops::Crews crews(3, true);
    LinearInputs in{{0}, {{}}, 9, random_values(9 * 96, 5), {}};
    in.residual = random_values(static_cast<size_t>(9 * n), 6);
    check_rows(expected_rows(linear, in), run_linear(linear, cache, in, &crews),
               "N " + std::to_string(n));
  }
}

// Rows are independent: what is no number stays in its row.
void test_linear_keeps_nan_in_its_row(bool exact) {
  const Parts parts{"all but adapters", true, true, true, true, false};
  const TestedLinear linear = gate_up(parts, exact);
  ops::AdapterCache cache = linear.cache();
  const TemporaryFolder folder;
  LinearInputs in = inputs(linear, parts, {1, 70}, Adapters(linear, folder));
  in.x[static_cast<size_t>(66 * linear.k + 40)] = NAN;
  ops::Crews crews(2, true);
  const std::vector<float> y = run_linear(linear, cache, in, &crews);
  const auto columns = static_cast<size_t>(linear.columns());
  size_t inside = 0, outside = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    if (std::isnan(y[i])) ++(i / columns == 66 ? inside : outside);
  }
  CHECK(inside == columns);
  CHECK(outside == 0);
}

}  // namespace
}  // namespace edgelora::test

int main() {
  using namespace edgelora::test;
  const TemporaryFolder folder;
  size_t turn = 0;
  for (const bool exact : {true, false}) {
    for (const Parts& parts : kParts) {
      test_linear_equals_sums_in_double(folder, parts, exact, &turn);
    }
    test_linear_of_any_width_equals_sums_in_double(exact);
    test_linear_keeps_nan_in_its_row(exact);
  }
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
