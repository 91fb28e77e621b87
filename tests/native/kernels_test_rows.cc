// rms_norm, exp_minus and rotate against their formulas in double.
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels_test.h"
#include "kernels_test_check.h"

namespace edgelora::kernels::test {
namespace {

constexpr double kEpsilon = 0x1p-24;
constexpr float kNan = __builtin_nanf("");
// ±1 around 4, 8 and 16 lanes, and around four registers of each; widths of real models.
constexpr int64_t kLengths[] = {1,  2,  3,  4,  5,  7,  8,  9,  15,  16,  17,  31,  32,
                                33, 48, 63, 64, 65, 80, 96, 127, 128, 129, 256, 576, 1000};

void fill(GuardedBytes& bytes, Random* random, float size) {
  for (size_t i = 0; i < bytes.size() / 4; ++i) bytes.as<float>()[i] = random->symmetric() * size;
}

GuardedBytes floats(int64_t n) { return GuardedBytes(static_cast<size_t>(n * 4)); }

// A sum of n squares, in any order, is off by at most (n − 1)·ε of itself and its squares by ε; the
// root halves that; mean, + epsilon, root, inverse and two products round once each.
double norm_tolerance(int64_t n) { return (static_cast<double>(n) / 2 + 6) * kEpsilon; }

void check_norm(const TestedIsa& isa, const float* x, const float* weight, int64_t n,
                float epsilon, const float* out) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const double inverse =
      1 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(epsilon));
  for (int64_t i = 0; i < n; ++i) {
    const double expected = static_cast<double>(x[i]) * inverse * static_cast<double>(weight[i]);
    const double error = std::fabs(static_cast<double>(out[i]) - expected);
    KERNELS_CHECK(error <= norm_tolerance(n) * std::fabs(expected),
                  "%s rms_norm n %lld at %lld: %.9g, not %.9g", isa.name.c_str(),
                  static_cast<long long>(n), static_cast<long long>(i),
                  static_cast<double>(out[i]), expected);
  }
}

void check_norm_of_length(const TestedIsa& isa, int64_t n, float size) {
  Random random(static_cast<uint64_t>(n));
  GuardedBytes x = floats(n), weight = floats(n), out = floats(n);
  fill(x, &random, size);
  fill(weight, &random, 2.0f);
  const float epsilon = 1e-5f;
  isa.table->rms_norm(x.as<float>(), weight.as<float>(), n, epsilon, out.as<float>());
  check_norm(isa, x.as<float>(), weight.as<float>(), n, epsilon, out.as<float>());
  isa.table->rms_norm(x.as<float>(), weight.as<float>(), n, epsilon, x.as<float>());
  KERNELS_CHECK(std::memcmp(x.as<char>(), out.as<char>(), out.size()) == 0,
                "%s rms_norm in place, n %lld", isa.name.c_str(), static_cast<long long>(n));
}

// One odd value among ones, at each place.
void check_norm_of_odd_values(const TestedIsa& isa) {
  constexpr int64_t n = 70;
  const std::vector<float> weight(n, 1.0f);
  std::vector<float> x(n, 0.0f), out(n, kNan);
  isa.table->rms_norm(x.data(), weight.data(), n, 1e-6f, out.data());
  for (const float value : out) {
    KERNELS_CHECK(value == 0.0f, "%s rms_norm of zeros", isa.name.c_str());
  }
  for (size_t at = 0; at < n; ++at) {
    x.assign(n, 1.0f);
    x[at] = kNan;
    isa.table->rms_norm(x.data(), weight.data(), n, 1e-6f, out.data());
    bool all = true;
    for (const float value : out) all = all && std::isnan(value);
    KERNELS_CHECK(all, "%s rms_norm: NaN at %zu must reach all", isa.name.c_str(), at);
    x[at] = -HUGE_VALF;
    isa.table->rms_norm(x.data(), weight.data(), n, 1e-6f, out.data());
    bool zero = true;
    for (size_t i = 0; i < n; ++i) zero = zero && (i == at ? std::isnan(out[i]) : out[i] == 0.0f);
    KERNELS_CHECK(zero, "%s rms_norm: −Inf at %zu", isa.name.c_str(), at);
  }
}

float largest_of(const TestedIsa& isa, const std::vector<float>& values) {
  GuardedBytes x = floats(static_cast<int64_t>(values.size()));
  std::memcpy(x.as<char>(), values.data(), x.size());
  return isa.table->largest(x.as<float>(), static_cast<int64_t>(values.size()));
}

// The largest at each place, negative or not, beside NaN and infinities.
void check_largest(const TestedIsa& isa, size_t n) {
  for (size_t at = 0; at < n; ++at) {
    for (const float most : {-0.5f, 7.0f, HUGE_VALF}) {
      std::vector<float> x(n, -1.0f);
      if (n > 1) x[(at + 1) % n] = at % 2 == 0 ? kNan : -HUGE_VALF;
      x[at] = most;
      KERNELS_CHECK(largest_of(isa, x) == most, "%s largest: %g at %zu of %zu", isa.name.c_str(),
                    static_cast<double>(most), at, n);
    }
  }
  KERNELS_CHECK(largest_of(isa, std::vector<float>(n, kNan)) == -HUGE_VALF,
                "%s largest of %zu NaN", isa.name.c_str(), n);
}

// e^(x − most): the difference is rounded (ε of it), and what an exponent is off by, its power is
// off by relatively; 4ε for the polynomial: reduction 0.3, its sums and products 2.5, 2^n none,
// truncation 0.1. Below −87 a kernel may give 0.
void check_exponentials(const TestedIsa& isa, const std::vector<float>& x, float most) {
  const auto n = static_cast<int64_t>(x.size());
  GuardedBytes out = floats(n);
  std::memcpy(out.as<char>(), x.data(), out.size());
  const double sum = static_cast<double>(isa.table->exp_minus(out.as<float>(), n, most));
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double power =
        static_cast<double>(x[static_cast<size_t>(i)]) - static_cast<double>(most);
    const double expected = std::exp(power), got = static_cast<double>(out.as<float>()[i]);
    const double tolerance =
        (std::fabs(power) + 4) * kEpsilon * expected + (power < -86.999 ? 1.7e-38 : 0.0);
    KERNELS_CHECK(std::fabs(got - expected) <= tolerance, "%s exp_minus(%.9g) = %.9g, not %.9g",
                  isa.name.c_str(), power, got, expected);
    total += got;
  }
  KERNELS_CHECK(std::fabs(sum - total) <= static_cast<double>(n) * kEpsilon * total,
                "%s exp_minus: sum of %lld is %.9g, not %.9g", isa.name.c_str(),
                static_cast<long long>(n), sum, total);
}

void check_exponentials_to_minus_200(const TestedIsa& isa) {
  for (const float most : {0.0f, 3.25f, -17.5f}) {
    std::vector<float> x;
    for (int i = 0; i <= 40000; ++i) x.push_back(most - static_cast<float>(i) * 0.005f);
    check_exponentials(isa, x, most);
  }
  std::vector<float> tiny;
  for (int i = 0; i < 149; ++i) tiny.push_back(-std::ldexp(1.0f, -i));
  check_exponentials(isa, tiny, 0.0f);
}

void check_exponentials_of_odd_values(const TestedIsa& isa) {
  for (size_t n : {1u, 7u, 8u, 9u, 16u, 17u, 40u}) {
    for (size_t at = 0; at < n; ++at) {
      std::vector<float> x(n, 2.0f);
      x[at] = -HUGE_VALF;
      float sum = isa.table->exp_minus(x.data(), static_cast<int64_t>(n), 2.0f);
      bool right = sum == static_cast<float>(n - 1);
      for (size_t i = 0; i < n; ++i) right = right && x[i] == (i == at ? 0.0f : 1.0f);
      KERNELS_CHECK(right, "%s exp_minus: −Inf at %zu of %zu", isa.name.c_str(), at, n);
      x.assign(n, 2.0f);
      x[at] = kNan;
      sum = isa.table->exp_minus(x.data(), static_cast<int64_t>(n), 2.0f);
      right = std::isnan(sum);
      for (size_t i = 0; i < n; ++i) right = right && (i == at ? std::isnan(x[i]) : x[i] == 1.0f);
      KERNELS_CHECK(right, "%s exp_minus: NaN at %zu of %zu", isa.name.c_str(), at, n);
    }
  }
}

// Two products and their sum: each product rounds once, then the sum.
void check_rotation(const TestedIsa& isa, int64_t half, bool in_place) {
  Random random(static_cast<uint64_t>(half));
  GuardedBytes x = floats(2 * half), cos = floats(half), sin = floats(half);
  fill(x, &random, 8.0f);
  fill(cos, &random, 1.0f);
  fill(sin, &random, 1.0f);
  const std::vector<float> before(x.as<float>(), x.as<float>() + 2 * half);
  GuardedBytes apart = floats(2 * half);
  float* out = in_place ? x.as<float>() : apart.as<float>();
  isa.table->rotate(x.as<float>(), cos.as<float>(), sin.as<float>(), half, out);
  for (int64_t i = 0; i < 2 * half; ++i) {
    const int64_t at = i % half;
    const auto a = static_cast<double>(before[static_cast<size_t>(at)]);
    const auto b = static_cast<double>(before[static_cast<size_t>(half + at)]);
    const auto c = static_cast<double>(cos.as<float>()[at]);
    const auto s = static_cast<double>(sin.as<float>()[at]);
    const double first = i < half ? a * c : b * c, second = i < half ? -b * s : a * s;
    const double error = std::fabs(static_cast<double>(out[i]) - (first + second));
    KERNELS_CHECK(error <= 2 * kEpsilon * (std::fabs(first) + std::fabs(second)),
                  "%s rotate half %lld at %lld", isa.name.c_str(), static_cast<long long>(half),
                  static_cast<long long>(i));
  }
}

// What is no number stays in its pair.
void check_rotation_of_nan(const TestedIsa& isa) {
  constexpr size_t half = 20;
  const std::vector<float> cos(half, 0.5f), sin(half, 0.25f);
  for (size_t at = 0; at < 2 * half; ++at) {
    std::vector<float> x(2 * half, 1.0f);
    x[at] = at % 2 == 0 ? kNan : HUGE_VALF;
    isa.table->rotate(x.data(), cos.data(), sin.data(), half, x.data());
    for (size_t i = 0; i < 2 * half; ++i) {
      KERNELS_CHECK(std::isfinite(x[i]) == (i % half != at % half), "%s rotate: %zu of %zu",
                    isa.name.c_str(), i, at);
    }
  }
}

}  // namespace

void test_rms_norm(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    for (const int64_t n : kLengths) {
      for (const float size : {1.0f, 1e-4f, 1e12f}) check_norm_of_length(isa, n, size);
    }
    check_norm_of_odd_values(isa);
  }
}

void test_largest(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    for (const int64_t n : kLengths) check_largest(isa, static_cast<size_t>(n));
    KERNELS_CHECK(isa.table->largest(nullptr, 0) == -HUGE_VALF, "%s largest of none",
                  isa.name.c_str());
  }
}

void test_exp_minus(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    for (const int64_t n : kLengths) {
      Random random(static_cast<uint64_t>(n));
      std::vector<float> x;
      for (int64_t i = 0; i < n; ++i) {
        x.push_back(5.0f - random.unit() * (i % 2 == 0 ? 2.0f : 40.0f));
      }
      check_exponentials(isa, x, 5.0f);
    }
    check_exponentials_to_minus_200(isa);
    check_exponentials_of_odd_values(isa);
  }
}

void test_rotate(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    for (const int64_t n : kLengths) {
      check_rotation(isa, n, true);
      check_rotation(isa, n, false);
    }
    check_rotation_of_nan(isa);
  }
}

}  // namespace edgelora::kernels::test
