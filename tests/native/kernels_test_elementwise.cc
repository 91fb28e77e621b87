// quantize_activations, the side branch and swiglu against their formulas in double.
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels_test.h"
#include "kernels_test_check.h"
#include "kernels_test_matrix.h"

namespace edgelora::kernels::test {
namespace {

constexpr double kEpsilon = 0x1p-24;

float activation(Random& random, int kind) {
  switch (kind) {
    case 0:
      return 0.0f;
    case 1:
      return random.symmetric() * 0x1p100f;
    case 2:
      return random.symmetric() * 0x1p-118f;  // around the smallest block that counts
    case 3:
      return static_cast<float>(random.between(-254, 254)) / 2.0f;  // ties, where amax is 127
    case 4:
      return random.symmetric() * 0x1p-140f;  // subnormal
    case 5:
      return std::ldexp(random.symmetric(), random.between(-40, 40));
    default:
      return random.symmetric();
  }
}

float largest_magnitude(const float* x, int64_t count) {
  float amax = 0.0f;
  for (int64_t i = 0; i < count; ++i) amax = std::max(amax, std::fabs(x[i]));
  return amax;
}

// top: 127 steps of the block.
void check_block(const std::string& name, const float* x, int64_t count, float top,
                 const int8_t* codes, float scale, int32_t sum) {
  const float amax = largest_magnitude(x, count);
  const bool zero = amax < 0x1p-119f;
  const float inverse = zero ? 0.0f : 127.0f / top;
  bool equal = true;
  int32_t total = 0;
  for (int64_t i = 0; i < 32; ++i) {
    const float rounded = i < count ? std::nearbyintf(x[i] * inverse) : 0.0f;
    equal = equal && static_cast<float>(codes[i]) == rounded;
    total += codes[i];
  }
  KERNELS_CHECK(equal, "%s: codes of a block of amax %g", name.c_str(), static_cast<double>(amax));
  KERNELS_CHECK(scale == (zero ? 0.0f : top / 127.0f), "%s: scale", name.c_str());
  KERNELS_CHECK(sum == total, "%s: sum %d, not %d", name.c_str(), sum, total);
}

// The largest magnitude of a block; if grouped, that of its group halved while no value of the
// block is above, five times at most.
float top_of(bool grouped, const float* x, int64_t features, int64_t block) {
  const auto largest_of = [&](int64_t begin, int64_t count) {
    return largest_magnitude(x + begin, std::min(count, features - begin));
  };
  const float amax = largest_of(32 * block, 32);
  if (!grouped) return amax;
  float top = largest_of(block / 4 * 128, 128);
  for (int i = 0; i < 5 && top / 2.0f >= amax; ++i) top /= 2.0f;
  return top;
}

using Quantize = decltype(KernelTable::quantize_activations);

void check_rows(const std::string& name, Quantize quantize, bool grouped) {
  for (int64_t features : {1, 7, 31, 32, 33, 63, 64, 65, 128, 129, 225, 576, 1000}) {
    for (int kind = 0; kind < 7; ++kind) {
      Random random(static_cast<uint64_t>(features * 10 + kind));
      const int64_t blocks = (features + 31) / 32;
      GuardedBytes x(static_cast<size_t>(features * 4)), codes(static_cast<size_t>(blocks * 32)),
          scales(static_cast<size_t>(blocks * 4)), sums(static_cast<size_t>(blocks * 4));
      for (int64_t k = 0; k < features; ++k) x.as<float>()[k] = activation(random, kind);
      if (kind == 3) x.as<float>()[features - 1] = 127.0f;
      quantize(x.as<float>(), features, codes.as<int8_t>(), scales.as<float>(),
               sums.as<int32_t>());
      for (int64_t b = 0; b < blocks; ++b) {
        check_block(name + " K=" + std::to_string(features), x.as<float>() + 32 * b,
                    std::min<int64_t>(32, features - 32 * b),
                    top_of(grouped, x.as<float>(), features, b), codes.as<int8_t>() + 32 * b,
                    scales.as<float>()[b], sums.as<int32_t>()[b]);
      }
    }
  }
}

// A block that holds no number has no part in what others become.
void check_odd_blocks(const std::string& name, Quantize quantize) {
  for (int64_t at : {3, 35}) {
    for (float odd : {HUGE_VALF, -HUGE_VALF, std::nanf("")}) {
      float x[40] = {1.0f}, scales[2];
      int8_t codes[64];
      int32_t sums[2];
      x[32] = 1.0f;
      x[at] = odd;
      quantize(x, 40, codes, scales, sums);
      const int64_t b = at / 32;
      bool zero = sums[b] == 0;
      for (int64_t i = 0; i < 32; ++i) zero = zero && codes[32 * b + i] == 0;
      KERNELS_CHECK(std::isnan(scales[b]) && zero, "%s: %g", name.c_str(),
                    static_cast<double>(odd));
      KERNELS_CHECK(scales[1 - b] == 1.0f / 127.0f, "%s: the other block", name.c_str());
    }
  }
}

void check_quantize(const std::string& name, Quantize quantize, bool grouped) {
  check_rows(name, quantize, grouped);
  check_odd_blocks(name, quantize);
}

void check_side_branch(const TestedIsa& isa, bool half, int64_t rank, int64_t in_features,
                       int64_t out_features) {
  Random random(static_cast<uint64_t>(rank * 7919 + in_features));
  const int64_t panels = (out_features + 15) / 16, size = half ? 2 : 4;
  GuardedBytes a(static_cast<size_t>(rank * in_features * size), rank % 2 == 0 ? 1 : 0);
  GuardedBytes b(static_cast<size_t>(panels * rank * 16 * size), rank % 3 == 0 ? 3 : 0);
  GuardedBytes x(static_cast<size_t>(in_features * 4)), t(static_cast<size_t>(rank * 4)),
      y(static_cast<size_t>(out_features * 4));
  // Values that float16 holds: eighths, subnormal sixteenths of 2^-20 among them.
  const auto fill = [&](GuardedBytes& bytes, std::vector<double>* values) {
    for (int64_t i = 0; i < static_cast<int64_t>(bytes.size()) / size; ++i) {
      const uint16_t bits = static_cast<uint16_t>(random.below(2) << 15 | random.below(16 << 10));
      const float value = static_cast<float>(half_value(bits));
      values->push_back(static_cast<double>(value));
      std::memcpy(bytes.as<char>() + i * size, half ? static_cast<const void*>(&bits) : &value,
                  static_cast<size_t>(size));
    }
  };
  std::vector<double> va, vb;
  fill(a, &va);
  fill(b, &vb);
  for (int64_t k = 0; k < in_features; ++k) x.as<float>()[k] = random.symmetric();
  for (int64_t i = 0; i < out_features; ++i) y.as<float>()[i] = random.symmetric();

  const Factors factors{half, rank, a.as<void>(), b.as<void>()};
  const float weight = -1.75f;
  isa.table->side_branch_down(factors, in_features, weight, x.as<float>(), t.as<float>());
  for (int64_t r = 0; r < rank; ++r) {
    double sum = 0.0, magnitude = 0.0;
    for (int64_t k = 0; k < in_features; ++k) {
      const double product =
          va[static_cast<size_t>(r * in_features + k)] * static_cast<double>(x.as<float>()[k]);
      sum += product;
      magnitude += std::fabs(product);
    }
    // Each value passes through at most K / 32 sums of its chain, 3 + 3 of chains and lanes, a rest
    // of 7.
    const double tolerance =
        1.75 * kEpsilon * (static_cast<double>(in_features / 32) + 16.0) * magnitude;
    KERNELS_CHECK(std::fabs(static_cast<double>(t.as<float>()[r]) + 1.75 * sum) <= tolerance,
                  "%s down rank %lld K %lld half %d: t[%lld] %g, not %g", isa.name.c_str(),
                  static_cast<long long>(rank), static_cast<long long>(in_features), half,
                  static_cast<long long>(r), static_cast<double>(t.as<float>()[r]), -1.75 * sum);
  }

  std::vector<double> expected, tolerance;
  for (int64_t n = 0; n < out_features; ++n) {
    double sum = static_cast<double>(y.as<float>()[n]), magnitude = std::fabs(sum);
    for (int64_t r = 0; r < rank; ++r) {
      const double product = vb[static_cast<size_t>((n / 16 * rank + r) * 16 + n % 16)] *
                             static_cast<double>(t.as<float>()[r]);
      sum += product;
      magnitude += std::fabs(product);
    }
    expected.push_back(sum);
    tolerance.push_back(kEpsilon * static_cast<double>(2 * rank + 2) * magnitude);
  }
  const int64_t middle = panels / 2;
  isa.table->side_branch_up(factors, out_features, t.as<float>(), 0, middle, y.as<float>());
  isa.table->side_branch_up(factors, out_features, t.as<float>(), middle, panels, y.as<float>());
  for (int64_t n = 0; n < out_features; ++n) {
    const auto i = static_cast<size_t>(n);
    KERNELS_CHECK(std::fabs(static_cast<double>(y.as<float>()[n]) - expected[i]) <= tolerance[i],
                  "%s up rank %lld N %lld at %lld: %g, not %g", isa.name.c_str(),
                  static_cast<long long>(rank), static_cast<long long>(out_features),
                  static_cast<long long>(n), static_cast<double>(y.as<float>()[n]), expected[i]);
  }
}

double silu_times(float gate, float up) {
  const double g = static_cast<double>(gate);
  return g / (1.0 + std::exp(-g)) * static_cast<double>(up);
}

}  // namespace

void test_quantize_activations(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    check_quantize(isa.name, isa.table->quantize_activations, false);
    if (isa.table->quantize_groups == nullptr) continue;
    check_quantize(isa.name + " in groups", isa.table->quantize_groups, true);
  }
}

void test_side_branch(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    for (bool half : {true, false}) {
      for (int64_t rank : {1, 2, 3, 4, 6, 7, 8, 16, 33}) {
        for (int64_t features : {1, 7, 8, 9, 31, 32, 33, 40, 576}) {
          check_side_branch(isa, half, rank, features, 16 * (features % 3) + 1 + features % 16);
        }
      }
    }
  }
}

void test_swiglu(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    for (int64_t n : {1, 7, 8, 9, 15, 16, 17, 31, 1536, 20001}) {
      Random random(static_cast<uint64_t>(n));
      GuardedBytes gate(static_cast<size_t>(n * 4)), up(static_cast<size_t>(n * 4)),
          out(static_cast<size_t>(n * 4));
      for (int64_t i = 0; i < n; ++i) {
        const float wide = i % 3 == 0 ? 120.0f : i % 3 == 1 ? 8.0f : 0.01f;
        gate.as<float>()[i] = random.symmetric() * wide;
        up.as<float>()[i] = random.symmetric() * 4.0f;
      }
      isa.table->swiglu(gate.as<float>(), up.as<float>(), n, out.as<float>());
      for (int64_t i = 0; i < n; ++i) {
        const double expected = silu_times(gate.as<float>()[i], up.as<float>()[i]);
        // 3e-7 of the value; below 1e-35, where e^-gate leaves float32, nearness to zero.
        KERNELS_CHECK(std::fabs(static_cast<double>(out.as<float>()[i]) - expected) <=
                          3e-7 * std::fabs(expected) + 1e-35,
                      "%s swiglu(%.9g, %.9g) = %.9g, not %.9g", isa.name.c_str(),
                      static_cast<double>(gate.as<float>()[i]),
                      static_cast<double>(up.as<float>()[i]),
                      static_cast<double>(out.as<float>()[i]), expected);
      }
    }
    const float ends[4] = {std::nanf(""), HUGE_VALF, std::numeric_limits<float>::max(),
                           -std::numeric_limits<float>::max()};
    const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    float out[4];
    isa.table->swiglu(ends, ones, 4, out);
    KERNELS_CHECK(std::isnan(out[0]) && out[1] == HUGE_VALF && out[2] == ends[2] && out[3] == 0.0f,
                  "%s: %g %g %g %g", isa.name.c_str(), static_cast<double>(out[0]),
                  static_cast<double>(out[1]), static_cast<double>(out[2]),
                  static_cast<double>(out[3]));
  }
}

}  // namespace edgelora::kernels::test
