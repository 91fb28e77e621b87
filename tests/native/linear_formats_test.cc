// LinearJob with every format and block size, 1 to 4 threads: however the panels are shared, y is
// what one sum in double gives. The matrices are those of kernels_test.
#include <cmath>
#include <string>
#include <vector>

#include "integer_kernels.h"
#include "kernels_test_matrix.h"
#include "ops/linear_job.h"
#include "sample.h"
#include "test_check.h"

namespace edgelora::test {
namespace {

using kernels::Format;
using kernels::test::Fill;
using kernels::test::Matrix;

constexpr int64_t kFeatures = 192;
// Enough for four threads even with one row; the last panel is partial.
const std::vector<int64_t> kSlices = {704, 51};
constexpr int64_t kColumns = 755;

// Rows whose int8 codes are exact: each block has 127, and all else is a whole number of the same
// step, a power of two that changes where sums of several rows are not rounded (magic_steps.h):
// with the row and the group of four blocks.
std::vector<float> exact_rows(int64_t rows) {
  kernels::test::Random random(static_cast<uint64_t>(rows));
  std::vector<float> x(static_cast<size_t>(rows * kFeatures));
  for (size_t i = 0; i < x.size(); ++i) {
    const int code = i % 32 == 5 ? 127 : random.between(-127, 127);
    const size_t row = i / kFeatures, group = i % kFeatures / 128;
    x[i] = std::ldexp(static_cast<float>(code), -static_cast<int>((row + group) % 3));
  }
  return x;
}

std::vector<float> run(const kernels::Weights& weights, const std::vector<float>& x, int64_t rows,
                       int64_t threads) {
  ops::Crews crews(threads, true);
  const ops::RowAdapters none;
  std::vector<float> y(static_cast<size_t>(rows * kColumns), NAN);
  ops::LinearCall call{};
  call.kernels = &integer_kernels();
  call.weights = &weights;
  call.panels = (kColumns + 15) / 16;
  call.x = x.data();
  call.y = y.data();
  call.rows = rows;
  call.sequence_length = rows;
  call.adapters = &none;
  call.threads = threads;
  ops::LinearJob(call).run(&crews);
  return y;
}

std::vector<double> sums(const Matrix& w, const std::vector<float>& x, int64_t rows) {
  std::vector<double> y;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < kColumns; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < kFeatures; ++k) {
        sum += double{w.weight(n, k)} * double{x[static_cast<size_t>(m * kFeatures + k)]};
      }
      y.push_back(sum);
    }
  }
  return y;
}

// Scales, offsets and steps of x are powers of two: the sums are exact. nf4's and fp4's integers
// stand for its values to half a step (of 124.125 or 62.5 to absmax, which is 1), its scales are
// float16.
double tolerance(Format format, const std::vector<float>& x, int64_t m) {
  if (!has_codebook(format)) return 0.0;
  double size = 0;
  for (int64_t k = 0; k < kFeatures; ++k) {
    size += std::abs(double{x[static_cast<size_t>(m * kFeatures + k)]});
  }
  return size * (0.5 / 62.5 + 0x1p-10);
}

void test_format(Format format, int64_t block_size, size_t* turn) {
  Matrix w({format, kFeatures, kSlices, block_size, 1.0}, Fill::kPowers, 7);
  const kernels::Weights weights = w.unpacked(integer_kernels());
  for (const int64_t rows : {1, 7, 12, 70}) {
    if (left_out(turn)) continue;
    const std::vector<float> x = exact_rows(rows);
    const std::vector<double> expected = sums(w, x, rows);
    for (int64_t threads = 1; threads <= 4; ++threads) {
      const std::vector<float> y = run(weights, x, rows, threads);
      int64_t wrong = 0;
      for (size_t i = 0; i < y.size(); ++i) {
        const double most = tolerance(format, x, static_cast<int64_t>(i) / kColumns);
        if (!(std::abs(double{y[i]} - expected[i]) <= most)) ++wrong;
      }
      check(wrong == 0, __FILE__, __LINE__,
            "format " + std::to_string(static_cast<int>(format)) + ", block " +
                std::to_string(block_size) + ", rows " + std::to_string(rows) + ", threads " +
                std::to_string(threads) + ": " + std::to_string(wrong) + " wrong");
    }
  }
}

}  // namespace
}  // namespace edgelora::test

int main() {
  using namespace edgelora::test;
  size_t turn = 0;
  for (const Format format :
       {Format::kInt4, Format::kInt4ZeroPoints, Format::kInt4Offsets, Format::kInt8}) {
    for (const int64_t block_size : {32, 64, 128}) test_format(format, block_size, &turn);
  }
  test_format(Format::kNf4, 64, &turn);
  test_format(Format::kFp4, 64, &turn);
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
