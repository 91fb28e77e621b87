// side_branch_up_int8 against its formula, of one row and several; the sum of integers is exact,
// two roundings and a sum follow.
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/half.h"
#include "kernels_test.h"
#include "kernels_test_check.h"

namespace edgelora::kernels::test {
namespace {

constexpr double kEpsilon = 0x1p-24;

// One matrix of random codes, the largest among them where `saturated`, and `rows` rows of t.
class Case {
 public:
  Case(int64_t rank, int64_t out_features, int64_t rows, bool saturated)
      : rank_(rank),
        n_(out_features),
        rows_(rows),
        quads_((rank + 3) / 4),
        panels_((out_features + 15) / 16),
        b_(static_cast<size_t>(panels_ * stride()), rank % 3 == 0 ? 1 : 0),
        t_(static_cast<size_t>(4 * rows * (2 + quads_))),
        y_(static_cast<size_t>(4 * rows * out_features)) {
    Random random(static_cast<uint64_t>(rank * 4096 + out_features));
    for (int64_t p = 0; p < panels_; ++p) {
      for (int64_t i = 0; i < 16; ++i) {
        const uint16_t scale = float_to_half(0.001f + random.unit());
        std::memcpy(panel(p) + 2 * i, &scale, 2);
      }
      for (int64_t i = 0; i < 64 * quads_; ++i) {
        const int code = saturated ? saturated_code(i / 4 % 16) : random.between(-127, 127);
        const bool surplus = i / 64 * 4 + i % 4 >= rank_;
        panel(p)[32 + i] = static_cast<uint8_t>(static_cast<int8_t>(surplus ? 0 : code));
      }
    }
    for (int64_t m = 0; m < rows_; ++m) fill_t(random, m, saturated);
    for (int64_t i = 0; i < rows_ * n_; ++i) y_.as<float>()[i] = 100.0f * random.symmetric();
  }

  void check(const TestedIsa& isa) {
    std::vector<double> before(y_.as<float>(), y_.as<float>() + rows_ * n_);
    PackedFactors factors{};
    factors.rank = rank_;
    factors.b = b_.as<uint8_t>();
    const PackedT t{rows_, t_.as<float>(), 2 + quads_};
    const int64_t middle = panels_ / 2;
    for (const auto& [begin, end] : {std::pair{int64_t{0}, middle}, std::pair{middle, panels_}}) {
      isa.table->side_branch_up_int8(factors, n_, t, begin, end, y_.as<float>(), n_);
    }
    for (int64_t i = 0; i < rows_ * n_; ++i) {
      const int64_t m = i / n_, n = i % n_;
      const double added = double{t_of(m)[0]} * scale(n) * static_cast<double>(sum(m, n));
      const double expected = before[static_cast<size_t>(i)] + added;
      // The integer as a float, two products, the sum.
      const double tolerance = kEpsilon * (4.0 * std::fabs(added) + std::fabs(expected));
      const auto found = static_cast<double>(y_.as<float>()[i]);
      KERNELS_CHECK(std::fabs(found - expected) <= tolerance,
                    "%s rank %lld N %lld: y[%lld, %lld] %.9g, not %.9g", isa.name.c_str(),
                    static_cast<long long>(rank_), static_cast<long long>(n_),
                    static_cast<long long>(m), static_cast<long long>(n), found, expected);
    }
  }

 private:
  // The same in all of a row, so that its sum is the largest; of either sign.
  static int saturated_code(int64_t row) { return row % 3 == 0 ? -127 : 127; }

  int64_t stride() const { return 32 + 64 * quads_; }
  uint8_t* panel(int64_t p) { return b_.as<uint8_t>() + p * stride(); }

  double scale(int64_t n) {
    return static_cast<double>(half_to_float(load_u16(panel(n / 16), n % 16)));
  }

  float* t_of(int64_t m) { return t_.as<float>() + m * (2 + quads_); }
  int8_t* codes(int64_t m) { return reinterpret_cast<int8_t*>(t_of(m) + 2); }

  void fill_t(Random& random, int64_t m, bool saturated) {
    t_of(m)[0] = -3.5e-3f * (1.0f + random.unit());
    for (int64_t r = 0; r < 4 * quads_; ++r) {
      const int code = saturated ? saturated_code(m) : random.between(-127, 127);
      codes(m)[r] = static_cast<int8_t>(r < rank_ ? code : 0);
    }
    const int32_t start = -128 * std::accumulate(codes(m), codes(m) + rank_, 0);
    std::memcpy(t_of(m) + 1, &start, sizeof start);
  }

  int64_t sum(int64_t m, int64_t n) {
    int64_t sum = 0;
    for (int64_t r = 0; r < rank_; ++r) {
      const auto b = static_cast<int8_t>(panel(n / 16)[32 + r / 4 * 64 + n % 16 * 4 + r % 4]);
      sum += int64_t{b} * codes(m)[r];
    }
    return sum;
  }

  int64_t rank_, n_, rows_, quads_, panels_;
  GuardedBytes b_, t_, y_;
};

}  // namespace

void test_packed_factors(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    for (int64_t rank : {1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 64, 512}) {
      for (int64_t out_features : {1, 15, 16, 17, 31, 32, 33, 64, 80, 577}) {
        for (int64_t rows : {1, 3, 4, 13}) {
          for (bool saturated : {false, true}) Case(rank, out_features, rows, saturated).check(isa);
        }
      }
      for (int64_t rows : {2, 5, 6, 7, 8, 9, 16, 77}) {  // more than an ISA sums at once, too
        for (int64_t out_features : {33, 80}) Case(rank, out_features, rows, true).check(isa);
      }
    }
  }
}

}  // namespace edgelora::kernels::test
