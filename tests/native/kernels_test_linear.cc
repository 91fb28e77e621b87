// linear and linear_float against double sums over the same quantized bytes.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels_test.h"
#include "kernels_test_matrix.h"
#include "sample.h"

namespace edgelora::kernels::test {
namespace {

constexpr double kEpsilon = 0x1p-24;  // half of the distance from 1 to the next float
constexpr float kUntouched = -12345.75f;

struct Expected {
  double value;
  double tolerance;
  double paired = 0.0;  // what avx512_vnni/magic_steps.h rounds away beside
};

// The integer that stands for a value of nf4 or fp4, and what divides it.
struct CodebookRounding {
  Arithmetic arithmetic;
  Format format;
  bool fp4() const { return format == Format::kFp4; }
  bool levels() const { return arithmetic == Arithmetic::kLevels; }
  double scale() const {
    return levels() ? (fp4() ? 240.0 : 250.0) : fp4() ? 120.0 : 124.125;
  }
  int integer(double value) const {
    const double zero = fp4() ? 64.0 : 63.75;
    return levels() ? 4 * static_cast<int>(std::nearbyint(scale() / 4 * value + zero)) -
                          static_cast<int>(4 * zero)
                    : static_cast<int>(std::nearbyint(scale() * value));
  }
  std::array<int, 16> integers() const {  // of each code; none of int formats
    std::array<int, 16> all{};
    if (!has_codebook(format)) return all;
    for (int i = 0; i < 16; ++i) all[static_cast<size_t>(i)] = integer(codebook_value(format, i));
    return all;
  }
  // What is taken from a block's dot: nf4's bytes are 5/32 too large on average.
  int64_t excess(int64_t codes) const {
    return levels() || fp4()
               ? 0
               : static_cast<int64_t>(std::ceil((5.0 * static_cast<double>(codes) - 16) / 32));
  }
};

constexpr double kHalfEpsilon = 0x1p-11;  // absmax becomes a float16

// A unit of the coarser block wherever the scale of x changes beneath one scale of W.
double paired_tolerance(const Matrix& w, Rows& x, int64_t m, int64_t n) {
  const int64_t step = w.shape().block_size / 32;
  double tolerance = 0.0;
  for (int64_t b = 0; b < x.blocks; ++b) {
    double most = 0.0;
    for (int64_t i = b / 4 * 4; i < std::min(b / 4 * 4 + 4, x.blocks); ++i) {
      most = std::max(most, x.scale(m, i));
    }
    const auto scale = [&](int64_t i) {  // of zeros, which have none, the largest
      return x.scale(m, i) == 0.0 ? most : x.scale(m, i);
    };
    if (b % step == 0 || scale(b) == scale(b - 1)) continue;
    tolerance += std::fabs(w.scale(n, b * 32)) * std::max(scale(b), scale(b - 1));
  }
  return tolerance;
}

// Whether the ISA multiplies so, of which `paired_tolerance` is true.
bool pairs(const TestedIsa& isa, const Shape& shape, int64_t rows, bool grouped) {
  return grouped && rows > 1 && shape.format == Format::kInt4 &&
         isa.table->quantize_groups != nullptr;
}

// What the integer path must give. The dots are exact integers. A block's term takes at most four
// roundings (two scales, the table's scale, the product), the running sum one for each term added
// to it.
Expected integer_sum(const Matrix& w, Rows& x, int64_t m, int64_t n,
                     const CodebookRounding& rounding, const std::array<int, 16>& integers) {
  const bool coded = has_codebook(w.shape().format);
  const int64_t features = w.shape().in_features;
  double sum = 0.0, magnitude = 0.0;
  for (int64_t b = 0; b < x.blocks; ++b) {
    const int64_t end = std::min<int64_t>(features, b * 32 + 32);
    int64_t dot = 0, codes = 0;
    for (int64_t k = b * 32; k < end; ++k) {
      const int code = w.code(n, k);
      const int integer = coded ? integers[static_cast<size_t>(code)] : code - w.zero_point(n, k);
      dot += integer * x.code(m, k);
      codes += x.code(m, k);
    }
    if (coded) dot -= rounding.excess(codes);
    const double scale = w.scale(n, b * 32) / (coded ? rounding.scale() : 1.0);
    const double product = scale * x.scale(m, b) * static_cast<double>(dot);
    const double shift = w.offset(n, b * 32) * x.scale(m, b) * static_cast<double>(codes);
    sum += product + shift;
    magnitude += std::fabs(product) + std::fabs(shift);
  }
  const double roundings = kEpsilon * static_cast<double>(2 * x.blocks + 5);
  return {sum, ((coded ? kHalfEpsilon : 0.0) + roundings) * magnitude,
          paired_tolerance(w, x, m, n)};
}

// What bfloat16 must give: both factors are rounded to 8 bits, their product and the sum of two of
// them to float; denormals are zero.
Expected bfloat16_sum(const Matrix& w, Rows& x, int64_t m, int64_t n) {
  const int64_t features = w.shape().in_features;
  double sum = 0.0, magnitude = 0.0;
  for (int64_t k = 0; k < features; ++k) {
    const double product =
        static_cast<double>(w.weight(n, k)) * x.scale(m, k / 32) * x.code(m, k);
    sum += product;
    magnitude += std::fabs(product);
  }
  const auto terms = static_cast<double>(features);
  return {sum, (0x1.02p-7 + kEpsilon * (terms + 4)) * magnitude + terms * 0x1p-126};
}

// What the exact path must give: every weight is one exact float. Sums of up to 128 products in
// four chains of float (32 + 3 roundings), the rest in double, the result rounded once.
Expected float_sum(const Matrix& w, const float* x, int64_t n) {
  double sum = 0.0, magnitude = 0.0;
  for (int64_t k = 0; k < w.shape().in_features; ++k) {
    const double product = static_cast<double>(w.weight(n, k)) * static_cast<double>(x[k]);
    sum += product;
    magnitude += std::fabs(product);
  }
  return {sum, kEpsilon * (36.0 * magnitude + std::fabs(sum))};
}

// y [rows, N] with three floats between rows, filled with a value that nothing may overwrite.
struct Output {
  Output(int64_t row_count, int64_t columns)
      : rows(row_count),
        stride(columns + 3),
        memory(static_cast<size_t>(((rows - 1) * stride + columns) * 4)),
        y(memory.as<float>()) {
    for (size_t i = 0; i < memory.size() / 4; ++i) y[i] = kUntouched;
  }
  int64_t rows, stride;
  GuardedBytes memory;
  float* y;
};

struct Scratch {
  explicit Scratch(const Weights& weights)
      : memory(static_cast<size_t>((linear_scratch_bytes(weights) + 63) / 64 * 64)) {
    std::memset(memory.as<void>(), 0xff, memory.size());  // NaN, if read before it is written
  }
  GuardedBytes memory;
};

void check_gaps(Output& out, int64_t columns, const std::string& name) {
  bool untouched = true;
  for (int64_t m = 0; m + 1 < out.rows; ++m) {
    for (int64_t i = columns; i < out.stride; ++i) {
      untouched = untouched && out.y[m * out.stride + i] == kUntouched;
    }
  }
  KERNELS_CHECK(untouched, "%s wrote beyond N", name.c_str());
}

std::vector<Expected> expected_linear(const Matrix& w, Rows& x, int64_t rows,
                                      Arithmetic arithmetic) {
  const CodebookRounding rounding{arithmetic, w.shape().format};
  const std::array<int, 16> integers = rounding.integers();
  std::vector<Expected> all;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < w.shape().out_features(); ++n) {
      all.push_back(arithmetic == Arithmetic::kBfloat16
                        ? bfloat16_sum(w, x, m, n)
                        : integer_sum(w, x, m, n, rounding, integers));
    }
  }
  return all;
}

void compare(Output& out, const std::vector<Expected>& expected, bool exact,
             const std::string& name, bool paired = false) {
  const auto columns = static_cast<int64_t>(expected.size()) / out.rows;
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto m = static_cast<int64_t>(i) / columns, n = static_cast<int64_t>(i) % columns;
    const double got = static_cast<double>(out.y[m * out.stride + n]);
    const double tolerance =
        (exact ? 0.0 : expected[i].tolerance) + (paired ? expected[i].paired : 0.0);
    KERNELS_CHECK(std::fabs(got - expected[i].value) <= tolerance,
                  "%s M=%lld at [%lld, %lld]: %.9g, not %.9g ± %.3g", name.c_str(),
                  static_cast<long long>(out.rows), static_cast<long long>(m),
                  static_cast<long long>(n), got, expected[i].value, tolerance);
  }
  check_gaps(out, columns, name);
}

// body(ISAs, shape, arithmetic) for all ISAs that multiply so many rows in the same way.
template <class Body>
void for_each_arithmetic(const std::vector<TestedIsa>& isas, Shape shape, int64_t rows,
                         Body body) {
  const bool coded = has_codebook(shape.format);
  for (Arithmetic each : {Arithmetic::kBytes, Arithmetic::kLevels, Arithmetic::kBfloat16}) {
    std::vector<TestedIsa> some;
    for (const TestedIsa& isa : isas) {
      const Arithmetic own = isa.of(rows);
      // Only nf4 and fp4 know levels.
      const bool bytes = own == Arithmetic::kLevels && !coded && each == Arithmetic::kBytes;
      if (bytes || (own == each && (coded || each != Arithmetic::kLevels))) some.push_back(isa);
    }
    if (coded) shape.absmax = CodebookRounding{each, shape.format}.scale();
    if (!some.empty()) body(some, shape, each);
  }
}

// What these read grouped scales of x for.
bool wants_groups(const std::vector<TestedIsa>& isas, const Shape& shape) {
  return std::any_of(isas.begin(), isas.end(), [&](const TestedIsa& isa) {
    return groups_scales(*isa.table, shape.format);
  });
}

void check_linear_of(const std::vector<TestedIsa>& isas, const Shape& shape, int64_t rows,
                     Fill fill, Arithmetic arithmetic, bool grouped) {
  const uint64_t seed = static_cast<uint64_t>(shape.in_features * 1000 + shape.out_features());
  Matrix w(shape, fill, seed);
  Rows x(rows, shape.in_features, fill, seed + 1, grouped);
  const std::vector<Expected> expected = expected_linear(w, x, rows, arithmetic);
  for (const TestedIsa& isa : isas) {
    const Weights packed = w.unpacked(*isa.table);
    Output out(rows, shape.out_features());
    Scratch scratch(packed);
    isa.table->linear(packed, x.activations(), 0, (shape.out_features() + 15) / 16, out.y,
                      out.stride, scratch.memory.as<void>());
    const bool exact = fill == Fill::kPowers || (fill == Fill::kSaturated && !grouped);
    compare(out, expected, exact && arithmetic != Arithmetic::kBfloat16,
            isa.name + (grouped ? " linear in groups " : " linear ") + shape.name(),
            pairs(isa, shape, rows, grouped));
  }
}

void check_linear(const std::vector<TestedIsa>& isas, const Shape& shape, int64_t rows, Fill fill) {
  for_each_arithmetic(isas, shape, rows,
                      [&](const std::vector<TestedIsa>& some, const Shape& same,
                          Arithmetic arithmetic) {
                        check_linear_of(some, same, rows, fill, arithmetic, false);
                        if (!wants_groups(some, same)) return;
                        check_linear_of(some, same, rows, fill, arithmetic, true);
                      });
}

void check_linear_float(const std::vector<TestedIsa>& isas, const Shape& shape, int64_t rows) {
  const uint64_t seed = static_cast<uint64_t>(shape.in_features * 1000 + shape.out_features());
  const Matrix w(shape, Fill::kRandom, seed);
  GuardedBytes x(static_cast<size_t>(rows * shape.in_features * 4));
  Random random(seed);
  for (int64_t i = 0; i < rows * shape.in_features; ++i) x.as<float>()[i] = random.symmetric();
  std::vector<Expected> expected;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < shape.out_features(); ++n) {
      expected.push_back(float_sum(w, x.as<float>() + m * shape.in_features, n));
    }
  }
  const Weights packed = w.packed();
  for (const TestedIsa& isa : isas) {
    Output out(rows, shape.out_features());
    Scratch scratch(packed);
    isa.table->linear_float(packed, x.as<float>(), rows, 0, (shape.out_features() + 15) / 16, out.y,
                            out.stride, scratch.memory.as<void>());
    compare(out, expected, false, isa.name + " linear_float " + shape.name());
  }
}

void check_dequantize_row(const std::vector<TestedIsa>& isas, const Shape& shape) {
  const Matrix w(shape, Fill::kRandom, 3);
  for (const TestedIsa& isa : isas) {
    for (int64_t n = 0; n < shape.out_features(); ++n) {
      GuardedBytes out(static_cast<size_t>(shape.in_features * 4));
      isa.table->dequantize_row(w.packed(), n, out.as<float>());
      bool equal = true;
      for (int64_t k = 0; k < shape.in_features; ++k) {
        equal = equal && out.as<float>()[k] == w.weight(n, k);
      }
      KERNELS_CHECK(equal, "%s dequantize_row %s row %lld", isa.name.c_str(), shape.name().c_str(),
                    static_cast<long long>(n));
    }
  }
}

constexpr Format kIntegerFormats[] = {Format::kInt4, Format::kInt4ZeroPoints, Format::kInt4Offsets,
                                      Format::kInt8, Format::kNf4, Format::kFp4};
constexpr int64_t kColumns[] = {1, 15, 16, 17, 31, 32, 33, 48, 49};
constexpr int64_t kDecodeRows = 8, kMostRows = 70;
constexpr int64_t kTurns = 2 * std::size(kColumns);  // of a width, beside those
constexpr int64_t kFeatures[] = {1, 31, 32, 33, 64, 95, 96, 128, 129, 160, 192, 257, 576};

template <class Body>
void for_each_width(Format format, Body body) {
  for (int64_t features : kFeatures) {
    if (has_codebook(format) && features % 32 != 0) continue;
    for (int64_t block : {32, 64, 128}) {
      if (has_codebook(format) && block != 64) continue;
      body(features, block);
    }
  }
}

// Every width with every M of decode; all M up to 70 and all N in turn.
template <class Body>
void for_all_shapes(Format format, Body body) {
  int64_t turn = 0;
  for_each_width(format, [&](int64_t features, int64_t block) {
    for (int64_t i = 1; i <= kDecodeRows + kTurns; ++i, ++turn) {
      const int64_t columns = kColumns[static_cast<size_t>(turn) % std::size(kColumns)];
      const int64_t rows = i <= kDecodeRows ? i : 1 + turn % kMostRows;
      body(Shape{format, features, {columns}, block}, rows);
    }
  });
}

// All M up to 70, widths and N in turn; those of decode with the largest width too.
template <class Body>
void for_some_shapes(Format format, Body body) {
  std::vector<std::pair<int64_t, int64_t>> widths;
  for_each_width(format, [&](int64_t features, int64_t block) {
    widths.emplace_back(features, block);
  });
  for (int64_t rows = 1; rows <= kMostRows; ++rows) {
    const auto turn = static_cast<size_t>(5 * rows);  // 5: coprime to both numbers of widths
    const auto [features, block] = widths[turn % widths.size()];
    const int64_t columns = kColumns[turn % std::size(kColumns)];
    body(Shape{format, features, {columns}, block}, rows);
    if (rows > kDecodeRows) continue;
    body(Shape{format, widths.back().first, {columns}, block}, rows);
  }
}

template <class Body>
void for_each_shape(Format format, Body body) {
  if (edgelora::test::one_case_in() == 1) return for_all_shapes(format, body);
  for_some_shapes(format, body);
}

}  // namespace

void test_linear(const std::vector<TestedIsa>& isas) {
  for (Format format : kIntegerFormats) {
    for_each_shape(format, [&](const Shape& shape, int64_t rows) {
      check_linear(isas, shape, rows, Fill::kRandom);
      check_linear(isas, shape, rows, Fill::kPowers);
    });
  }
  // nf4 in slices; K no multiple of 64; absmax groups that end inside a row, a panel and a slice.
  for (const std::vector<int64_t>& slices :
       {std::vector<int64_t>{16, 48, 32}, {32, 16}, {128, 16, 16, 17}}) {
    for (int64_t features : {32, 96, 160, 576, 1056}) {
      for (int64_t rows : {1, 3, 8, 20}) {
        check_linear(isas, {Format::kNf4, features, slices, 64}, rows, Fill::kRandom);
        check_linear(isas, {Format::kNf4, features, slices, 64}, rows, Fill::kPowers);
        check_linear(isas, {Format::kFp4, features, slices, 64}, rows, Fill::kPowers);
      }
    }
  }
  // More rows than any ISA takes at a time, more K than one chunk.
  for (Format format : kIntegerFormats) {
    check_linear(isas, {format, 1312, {33}, has_codebook(format) ? 64 : 32}, 145, Fill::kRandom);
  }
}

void test_linear_saturated(const std::vector<TestedIsa>& isas) {
  for (Format format : kIntegerFormats) {
    for_each_width(format, [&](int64_t features, int64_t block) {
      for (int64_t rows : {1, 2, 5, 33}) {
        check_linear(isas, {format, features, {35}, block}, rows, Fill::kSaturated);
      }
    });
  }
}

void test_linear_zero(const std::vector<TestedIsa>& isas) {
  for (Format format : kIntegerFormats) {
    for_each_width(format, [&](int64_t features, int64_t block) {
      for (int64_t rows : {1, 5, 33}) {
        check_linear(isas, {format, features, {35}, block}, rows, Fill::kZero);
      }
    });
  }
}

// Panels one by one and out of order: each call writes its own and nothing else.
void check_panel_ranges(const TestedIsa& isa, const Weights& packed, Rows& x, int64_t rows,
                        const std::vector<Expected>& expected, bool exact,
                        const std::string& name) {
  Output out(rows, 70);
  Scratch scratch(packed);
  const auto run = [&](int64_t begin, int64_t end) {
    isa.table->linear(packed, x.activations(), begin, end, out.y, out.stride,
                      scratch.memory.as<void>());
  };
  run(1, 3);
  bool outside = true;
  for (int64_t n = 0; n < 70; ++n) {
    if (n < 16 || n >= 48) outside = outside && out.y[n] == kUntouched;
  }
  KERNELS_CHECK(outside, "%s wrote outside its panels", isa.name.c_str());
  run(0, 1), run(3, 3), run(4, 5), run(3, 4);
  compare(out, expected, exact, isa.name + " panel ranges " + name);
}

// The same bits wherever a thread's panels begin and end, of values whose sums are rounded.
void check_panels_alone(const TestedIsa& isa, const Shape& shape, int64_t rows, bool grouped) {
  Matrix w(shape, Fill::kRandom, 7);
  Rows x(rows, shape.in_features, Fill::kRandom, 8, grouped);
  const Weights packed = w.unpacked(*isa.table);
  Output together(rows, 70), alone(rows, 70);
  Scratch scratch(packed);
  const auto run = [&](Output& out, int64_t begin, int64_t end) {
    isa.table->linear(packed, x.activations(), begin, end, out.y, out.stride,
                      scratch.memory.as<void>());
  };
  run(together, 0, 5);
  for (int64_t begin : {0, 3, 4}) run(alone, begin, begin == 0 ? 3 : begin + 1);
  bool same = true;
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = m * together.stride;
    same = same && !std::memcmp(together.y + row, alone.y + row, 70 * sizeof(float));
  }
  KERNELS_CHECK(same, "%s: other bits from other panels, %s, %d rows", isa.name.c_str(),
                shape.name().c_str(), static_cast<int>(rows));
}

// The same bits however many rows there are: what a session computes token by token and at once.
// Not of int4 whose scale holds for several blocks of grouped x: their sums are rounded otherwise.
void check_rows_alone(const TestedIsa& isa, const Shape& shape, bool grouped) {
  constexpr int64_t kRows = 29;
  Matrix w(shape, Fill::kRandom, 11);
  Rows x(kRows, shape.in_features, Fill::kRandom, 12, grouped);
  const Weights packed = w.unpacked(*isa.table);
  const int64_t columns = shape.out_features(), panels = (columns + 15) / 16;
  Output alone(kRows, columns), together(kRows, columns);
  Scratch scratch(packed);
  const auto run = [&](int64_t first, int64_t rows, Output& out) {
    const int64_t block = first * x.blocks;
    const Activations all = x.activations();
    const Activations some{rows, all.codes + block * kActivationBlock, all.scales + block,
                           all.sums + block, false, grouped};
    isa.table->linear(packed, some, 0, panels, out.y + first * out.stride, out.stride,
                      scratch.memory.as<void>());
  };
  for (int64_t m = 0; m < kRows; ++m) run(m, 1, alone);
  for (int64_t rows : {2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 29}) {
    run(0, rows, together);
    bool same = true;
    for (int64_t m = 0; m < rows; ++m) {
      same = same && !std::memcmp(together.y + m * together.stride, alone.y + m * alone.stride,
                                  static_cast<size_t>(columns) * sizeof(float));
    }
    KERNELS_CHECK(same, "%s: other bits of %d rows than of each alone, %s", isa.name.c_str(),
                  static_cast<int>(rows), shape.name().c_str());
  }
}

void test_linear_rows_alone(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    if (isa.of(1) != isa.of(kMostRows)) continue;  // many rows are multiplied in another way
    for (Format format : kIntegerFormats) {
      for_each_width(format, [&](int64_t features, int64_t block) {
        const Shape shape{format, features, {49}, block};
        check_rows_alone(isa, shape, false);
        const bool together = format == Format::kInt4 && block > 32;
        if (wants_groups({isa}, shape) && !together) check_rows_alone(isa, shape, true);
      });
    }
  }
}

void test_linear_panel_ranges(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    for (Format format : kIntegerFormats) {
      for (int64_t rows : {1, 4, 7, 35, 70}) {
        const int64_t block_size = has_codebook(format) ? 64 : 128;
        const Shape shape{format, 2048, {70}, block_size};
        check_panels_alone(isa, shape, rows, false);
        if (wants_groups({isa}, shape)) check_panels_alone(isa, shape, rows, true);
      }
    }
  }
  for (Format format : kIntegerFormats) {
    for (int64_t rows : {1, 4, 35}) {
      const auto check = [rows](const std::vector<TestedIsa>& some, const Shape& shape,
                                Arithmetic arithmetic) {
        Matrix w(shape, Fill::kPowers, 5);
        Rows x(rows, shape.in_features, Fill::kPowers, 6);
        const std::vector<Expected> expected = expected_linear(w, x, rows, arithmetic);
        for (const TestedIsa& isa : some) {
          check_panel_ranges(isa, w.unpacked(*isa.table), x, rows, expected,
                             arithmetic != Arithmetic::kBfloat16, shape.name());
        }
      };
      for_each_arithmetic(isas, {format, 96, {70}, has_codebook(format) ? 64 : 32}, rows, check);
    }
  }
}

// Panels with room for more K, as those of a cache that grows along K.
void test_linear_room(const std::vector<TestedIsa>& isas) {
  for (Format format : {Format::kFloat, Format::kInt4, Format::kInt4ZeroPoints,
                        Format::kInt4Offsets, Format::kInt8, Format::kNf4, Format::kFp4}) {
    for_each_width(format, [&](int64_t features, int64_t block) {
      const Shape shape{format, features, {49}, block, 0, 256};
      for (int64_t rows : {1, 3, 18}) {
        if (format != Format::kFloat) check_linear(isas, shape, rows, Fill::kPowers);
        check_linear_float(isas, shape, rows);
      }
      check_dequantize_row(isas, shape);
    });
  }
}

// Rows of zeros beside one that holds `odd`.
void check_not_a_number(const TestedIsa& isa, Format format, float odd, bool grouped) {
  Matrix w({format, 192, {17}, 64}, Fill::kRandom, 9);
  constexpr int64_t kRows = 13;
  float x[kRows][192] = {}, scales[kRows][6], y[kRows][17];
  int8_t codes[kRows][192];
  int32_t sums[kRows][6];
  x[0][40] = odd;
  const auto quantize = grouped ? isa.table->quantize_groups : isa.table->quantize_activations;
  for (int64_t m = 0; m < kRows; ++m) quantize(x[m], 192, codes[m], scales[m], sums[m]);
  const Weights packed = w.unpacked(*isa.table);
  for (int64_t rows : {1, 2, 5, 13}) {
    Scratch scratch(packed);
    isa.table->linear(packed, {rows, codes[0], scales[0], sums[0], false, grouped}, 0, 2, y[0], 17,
                      scratch.memory.as<void>());
    const auto odd_values = [&](int64_t m) {
      return std::count_if(y[m], y[m] + 17, [](float value) { return std::isnan(value); });
    };
    KERNELS_CHECK(odd_values(0) == 17, "%s: %g in x is lost in y", isa.name.c_str(),
                  static_cast<double>(odd));
    for (int64_t m = 1; m < rows; ++m) {
      KERNELS_CHECK(odd_values(m) == 0, "%s: %g in x is in another row", isa.name.c_str(),
                    static_cast<double>(odd));
    }
  }
}

void test_linear_not_a_number(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    for (float odd : {HUGE_VALF, -HUGE_VALF, std::nanf("")}) {
      for (Format format : kIntegerFormats) {
        check_not_a_number(isa, format, odd, false);
        if (isa.table->quantize_groups != nullptr) check_not_a_number(isa, format, odd, true);
      }
    }
  }
}

void test_linear_float(const std::vector<TestedIsa>& isas) {
  for (Format format : {Format::kFloat, Format::kInt4, Format::kInt4ZeroPoints,
                        Format::kInt4Offsets, Format::kInt8, Format::kNf4, Format::kFp4}) {
    for_each_shape(
        format, [&](const Shape& shape, int64_t rows) { check_linear_float(isas, shape, rows); });
  }
  for (int64_t features : {31, 96, 257}) {  // offsets in float32; linear has them in float16
    for (int64_t room : {0, 256}) {
      const Shape shape{Format::kInt4Offsets, features, {16, 19}, 64, 0, room, true};
      check_linear_float(isas, shape, 3);
      check_dequantize_row(isas, shape);
      check_linear(isas, shape, 3, Fill::kPowers);
    }
  }
  for (int64_t features : {96, 160, 1056}) {
    check_linear_float(isas, {Format::kNf4, features, {32, 16, 64}, 64}, 3);
  }
}

// scales · unit · the table's scale is absmax, to float16's precision, whatever its size; −1:
// random.
void check_unpack_absmax(const TestedIsa& isa, Format format, double absmax) {
  Shape shape{format, 160, {16, 48, 32}, 64, absmax};
  Matrix w(shape, absmax < 0 ? Fill::kRandom : Fill::kPowers, 11);
  const Weights weights = w.unpacked(*isa.table);
  const double one =
      CodebookRounding{isa.of(1), format}.scale() * static_cast<double>(weights.scale_unit);
  bool near = true;
  for (int64_t n = 0; n < shape.out_features(); ++n) {
    for (int64_t k = 0; k < shape.in_features; k += 32) {
      const int64_t i = (n / 16 * 5 + k / 32) * 16 + n % 16;
      const double got = half_value(weights.scales[i]) * one, want = w.scale(n, k);
      near = near && std::fabs(got - want) <= 1.001 * kHalfEpsilon * std::fabs(want);
    }
  }
  KERNELS_CHECK(near, "%s unpack_absmax near %g", isa.name.c_str(), absmax);
}

void test_unpack_absmax(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    for (double absmax : {-1.0, 0.0, 1.0, 1e-3, 3e4, 1e30, 1e-30}) {
      check_unpack_absmax(isa, Format::kNf4, absmax);
      check_unpack_absmax(isa, Format::kFp4, absmax);
    }
  }
}

// Products as numpy rounds them, then to 16 bits: exact, by linear_float of unit vectors.
void check_rounding(const TestedIsa& isa, Format format, Rounding rounding, double unit) {
  constexpr int64_t kFeatures = 160;
  Matrix w({format, kFeatures, {48}, 64}, Fill::kRandom, 11);
  Weights packed = w.packed();
  packed.rounding = rounding;
  Scratch scratch(packed);
  std::vector<float> row(kFeatures), unit_vector(kFeatures), y(48);
  for (int64_t k : {0, 33, 159}) {
    unit_vector.assign(kFeatures, 0.0f);
    unit_vector[k] = 1.0f;
    isa.table->linear_float(packed, unit_vector.data(), 1, 0, 3, y.data(), 48,
                            scratch.memory.as<void>());
    for (int64_t n = 0; n < 48; ++n) {
      const double exact = w.weight(n, k), found = y[n], difference = std::fabs(found - exact);
      int exponent;
      std::frexp(found, &exponent);
      const double smallest = rounding == Rounding::kFloat16 ? 0x1p-24 : 0.0;
      const double last = std::fmax(std::ldexp(unit, exponent), smallest);  // place of 16 bits
      KERNELS_CHECK(difference <= last / 2 && std::remainder(found, last) == 0.0,
                    "%s rounds %g to %g", isa.name.c_str(), exact, found);
      isa.table->dequantize_row(packed, n, row.data());
      KERNELS_CHECK(row[k] == y[n], "%s: a row has %g, a product %g", isa.name.c_str(),
                    static_cast<double>(row[k]), found);
    }
  }
}

void test_codebook_rounding(const std::vector<TestedIsa>& isas) {
  for (const TestedIsa& isa : isas) {
    for (Format format : {Format::kNf4, Format::kFp4}) {
      check_rounding(isa, format, Rounding::kBfloat16, 0x1p-8);
      check_rounding(isa, format, Rounding::kFloat16, 0x1p-11);
    }
  }
}

void test_dequantize_row(const std::vector<TestedIsa>& isas) {
  for (Format format : {Format::kFloat, Format::kInt4, Format::kInt4ZeroPoints,
                        Format::kInt4Offsets, Format::kInt8, Format::kNf4, Format::kFp4}) {
    for_each_width(format, [&](int64_t features, int64_t block) {
      check_dequantize_row(isas, {format, features, {16, 19}, block});
    });
  }
}

}  // namespace edgelora::kernels::test
