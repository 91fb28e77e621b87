#include "kernels_test_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace edgelora::kernels::test {

// bitsandbytes' code books.
namespace {
const double kNf4[16] = {-1.0,
                         -0.6961928009986877,
                         -0.5250730514526367,
                         -0.39491748809814453,
                         -0.28444138169288635,
                         -0.18477343022823334,
                         -0.09105003625154495,
                         0.0,
                         0.07958029955625534,
                         0.16093020141124725,
                         0.24611230194568634,
                         0.33791524171829224,
                         0.44070982933044434,
                         0.5626170039176941,
                         0.7229568362236023,
                         1.0};
const double kFp4[16] = {0.0,  0.0625 / 12,  8.0 / 12,  1.0,  4.0 / 12,  0.5,  2.0 / 12,  0.25,
                         -0.0, -0.0625 / 12, -8.0 / 12, -1.0, -4.0 / 12, -0.5, -2.0 / 12, -0.25};


const char* format_name(Format format) {
  switch (format) {
    case Format::kFloat:
      return "float";
    case Format::kInt4:
      return "int4";
    case Format::kInt4ZeroPoints:
      return "int4 zero points";
    case Format::kInt4Offsets:
      return "int4 offsets";
    case Format::kInt8:
      return "int8";
    case Format::kNf4:
      return "nf4";
    case Format::kFp4:
      return "fp4";
  }
  return "?";
}

int64_t panels_of(const Shape& shape) { return (shape.out_features() + 15) / 16; }

}  // namespace

double codebook_value(Format format, int code) {
  return static_cast<double>(static_cast<float>((format == Format::kFp4 ? kFp4 : kNf4)[code]));
}

int64_t Shape::out_features() const {
  int64_t sum = 0;
  for (int64_t slice : slices) sum += slice;
  return sum;
}

std::string Shape::name() const {
  return std::string(format_name(format)) + " N=" + std::to_string(out_features()) +
         " K=" + std::to_string(in_features) + " block=" + std::to_string(block_size);
}

// 1024 + mantissa times a power of two; subnormals have the smallest normal's and no 1024.
double half_value(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double power = static_cast<double>(1 << std::max(exponent - 1, 0)) * 0x1p-24;
  const double magnitude = (exponent == 0 ? mantissa : 1024 + mantissa) * power;
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

uint16_t half_bits(double value) {
  for (int bits = 0; bits < 0x7c00; ++bits) {
    if (half_value(static_cast<uint16_t>(bits)) == std::fabs(value)) {
      return static_cast<uint16_t>(value < 0 ? bits | 0x8000 : bits);
    }
  }
  std::abort();
}

Matrix::Matrix(const Shape& shape, Fill fill, uint64_t seed) : shape_(shape) {
  Random random(seed);
  fill_codes(fill, random);
  if (has_codebook(shape.format)) {
    fill_absmax(fill, random);
  } else if (shape.format != Format::kFloat) {
    fill_scales(fill, random);
  }
  for (int64_t n = 0; shape.format != Format::kFloat && n < shape.out_features(); ++n) {
    for (int64_t k = 0; k < shape.in_features; ++k) weights_.push_back(dequantized(n, k));
  }
  pack();
}

void Matrix::fill_codes(Fill fill, Random& random) {
  const auto size = static_cast<size_t>(shape_.out_features() * shape_.in_features);
  if (shape_.format == Format::kFloat) {
    for (size_t i = 0; i < size; ++i) weights_.push_back(random.symmetric());
    return;
  }
  const int low = shape_.format == Format::kInt8 ? -128 : 0;
  const int high = shape_.format == Format::kInt8 ? 127 : 15;
  // Saturated: a row is all low, all high, or both in turn.
  for (size_t i = 0; i < size; ++i) {
    const size_t row = i / static_cast<size_t>(shape_.in_features);
    const bool top = row % 3 == 0 || (row % 3 == 2 && i % 2 == 0);
    codes_.push_back(fill == Fill::kSaturated ? (top ? high : low) : random.between(low, high));
  }
}

void Matrix::fill_scales(Fill fill, Random& random) {
  static const uint16_t kPowers[] = {half_bits(0.25), half_bits(0.5), half_bits(1.0)};
  const int64_t count = shape_.out_features() * shape_.blocks();
  for (int64_t i = 0; i < count; ++i) {
    if (fill == Fill::kRandom) {
      // Every exponent but Inf's, subnormals and zero included; some scales are negative.
      const int exponent = i % 7 == 0 ? 0 : random.between(8, 14);
      const int bits = random.below(2) << 15 | exponent << 10 | random.below(1024);
      scales_.push_back(static_cast<uint16_t>(bits));
      offsets_.push_back(
          static_cast<uint16_t>(random.below(2) << 15 | 11 << 10 | random.below(1024)));
    } else {
      const bool zero = fill == Fill::kZero && random.below(2) == 0;
      const uint16_t power = fill == Fill::kSaturated ? kPowers[2] : kPowers[random.below(3)];
      scales_.push_back(zero ? half_bits(0.0) : power);
      offsets_.push_back(kPowers[random.below(3)]);
    }
    const int extreme = random.below(2) * 15;
    zero_points_.push_back(fill == Fill::kSaturated ? extreme : random.below(16));
  }
}

void Matrix::fill_absmax(Fill fill, Random& random) {
  const bool exact = fill != Fill::kRandom;
  for (int i = 0; i < 256; ++i) {
    const float other = fill == Fill::kPowers ? 0.5f : fill == Fill::kZero ? 0.0f : 1.0f;
    const float power = i % 2 != 0 ? other : 1.0f;
    table_.push_back(exact ? static_cast<float>(shape_.absmax) * power : random.symmetric());
  }
  for (int64_t slice : shape_.slices) {
    const int64_t blocks = (slice * shape_.in_features + 63) / 64;
    const int64_t padded = (blocks + 255) / 256 * 256;
    for (int64_t i = 0; i < padded; ++i) {
      absmax_.push_back(static_cast<uint8_t>(i < blocks ? random.below(256) : 0));
    }
    for (int64_t i = 0; i < padded / 256; ++i) nested_.push_back(exact ? 1.0f : random.unit());
    absmax_offset_.push_back(exact ? 0.0f : random.unit());
  }
}

int64_t Matrix::absmax_index(int64_t n, int64_t k, int64_t* slice) const {
  int64_t first = 0;
  *slice = 0;
  while (n >= shape_.slices[static_cast<size_t>(*slice)]) {
    const int64_t rows = shape_.slices[static_cast<size_t>(*slice)];
    first += ((rows * shape_.in_features + 63) / 64 + 255) / 256 * 256;
    n -= rows;
    ++*slice;
  }
  return first + (n * shape_.in_features + k) / 64;
}

int Matrix::code(int64_t n, int64_t k) const {
  return codes_[static_cast<size_t>(n * shape_.in_features + k)];
}

int Matrix::zero_point(int64_t n, int64_t k) const {
  if (shape_.format == Format::kInt4) return 8;
  if (shape_.format != Format::kInt4ZeroPoints) return 0;
  return zero_points_[static_cast<size_t>(n * shape_.blocks() + k / shape_.block_size)];
}

double Matrix::scale(int64_t n, int64_t k) const {
  if (!has_codebook(shape_.format)) {
    return half_value(scales_[static_cast<size_t>(n * shape_.blocks() + k / shape_.block_size)]);
  }
  int64_t slice = 0;
  const auto i = static_cast<size_t>(absmax_index(n, k, &slice));
  const float product = table_[absmax_[i]] * nested_[i / 256];
  return static_cast<double>(product + absmax_offset_[static_cast<size_t>(slice)]);
}

double Matrix::offset(int64_t n, int64_t k) const {
  if (shape_.format != Format::kInt4Offsets) return 0.0;
  return half_value(offsets_[static_cast<size_t>(n * shape_.blocks() + k / shape_.block_size)]);
}

float Matrix::exact_offset(int64_t n, int64_t k) const {
  const double half = offset(n, k);
  return static_cast<float>(shape_.exact_offsets ? half * (1 + 0x1p-13) : half);
}

float Matrix::dequantized(int64_t n, int64_t k) const {
  // A double holds the product of two floats, and rounds to the same float as one operation would.
  const double value = has_codebook(shape_.format)
                           ? codebook_value(shape_.format, code(n, k))
                           : code(n, k) - zero_point(n, k);
  const float product = static_cast<float>(scale(n, k) * value);
  return static_cast<float>(static_cast<double>(product) + static_cast<double>(exact_offset(n, k)));
}

void Matrix::pack() {
  packed_.format = shape_.format;
  packed_.in_features = shape_.in_features;
  packed_.out_features = shape_.out_features();
  packed_.block_size = shape_.block_size;
  packed_.slices = shape_.slices.data();
  packed_.slice_count = static_cast<int64_t>(shape_.slices.size());
  if (shape_.format == Format::kFloat) return pack_floats();
  pack_codes();
  has_codebook(shape_.format) ? pack_absmax() : pack_scales();
}

// Panels of `used` bytes, zero, and between them ones (as a scale: NaN); no room after the last
// panel.
uint8_t* Matrix::allocate(int64_t stride, int64_t used, size_t slack) {
  const int64_t panels = panels_of(shape_), size = (panels - 1) * stride + used;
  memory_.push_back(std::make_unique<GuardedBytes>(static_cast<size_t>(size), slack));
  uint8_t* out = memory_.back()->as<uint8_t>();
  for (int64_t p = 0; p + 1 < panels; ++p) {
    std::memset(out + p * stride + used, 0xff, static_cast<size_t>(stride - used));
  }
  return out;
}

void Matrix::pack_floats() {
  const int64_t panel_stride = (shape_.in_features + shape_.room) * 64;
  if (shape_.room != 0) packed_.panel_stride = panel_stride;
  uint8_t* out = allocate(panel_stride, shape_.in_features * 64, slack());
  for (int64_t n = 0; n < shape_.out_features(); ++n) {
    for (int64_t k = 0; k < shape_.in_features; ++k) {
      const float w = weight(n, k);
      std::memcpy(out + n / 16 * panel_stride + (k * 16 + n % 16) * 4, &w, 4);
    }
  }
  packed_.codes = out;
}

void Matrix::pack_codes() {
  const bool bytes = shape_.format == Format::kInt8;
  const int64_t padded = (shape_.in_features + 31) / 32 * 32;
  const int64_t code_bytes = 16 * padded / (bytes ? 1 : 2);
  const int64_t panel_stride = code_bytes + 16 * shape_.room / (bytes ? 1 : 2);
  if (shape_.room != 0) packed_.panel_stride = panel_stride;
  uint8_t* codes = allocate(panel_stride, code_bytes, slack());
  for (int64_t n = 0; n < shape_.out_features(); ++n) {
    uint8_t* row = codes + n / 16 * panel_stride + n % 16 * 4;
    for (int64_t k = 0; k < shape_.in_features; ++k) {
      uint8_t& byte = row[k / (bytes ? 4 : 8) * 64 + k % 4];
      byte = static_cast<uint8_t>(byte | (code(n, k) & 0xff) << (bytes || k % 8 < 4 ? 0 : 4));
    }
  }
  packed_.codes = codes;
}

void Matrix::pack_absmax() {
  const auto keep = [this](const auto& values) {
    const size_t size = values.size() * sizeof values[0];
    memory_.push_back(std::make_unique<GuardedBytes>(size));
    std::memcpy(memory_.back()->as<void>(), values.data(), size);
    return memory_.back()->as<std::remove_const_t<std::remove_reference_t<decltype(values[0])>>>();
  };
  packed_.absmax = keep(absmax_);
  packed_.nested_absmax = keep(nested_);
  packed_.absmax_offset = keep(absmax_offset_);
  packed_.absmax_table = keep(table_);
}

// [panels, blocks, 16] of value(n, block)
template <class T, class Value>
T* Matrix::pack_blocks(Value value) {
  constexpr int64_t kBytes = 16 * sizeof(T);
  const int64_t blocks = shape_.blocks();
  uint8_t* out = allocate(block_stride() * kBytes, blocks * kBytes, slack());
  for (int64_t n = 0; n < shape_.out_features(); ++n) {
    for (int64_t b = 0; b < blocks; ++b) {
      const T one = value(n, b);
      std::memcpy(out + (n / 16 * block_stride() + b) * kBytes + n % 16 * sizeof(T), &one,
                  sizeof(T));
    }
  }
  return reinterpret_cast<T*>(out);
}

void Matrix::pack_scales() {
  if (shape_.room != 0) packed_.block_stride = block_stride();
  const int64_t blocks = shape_.blocks();
  const auto of = [&](const auto& values) {
    return [&](int64_t n, int64_t b) { return values[static_cast<size_t>(n * blocks + b)]; };
  };
  packed_.scales = pack_blocks<uint16_t>(of(scales_));
  if (shape_.format == Format::kInt4Offsets) {
    packed_.zero_points = pack_blocks<uint16_t>(of(offsets_));
  }
  if (shape_.exact_offsets) {
    packed_.exact_offsets = pack_blocks<float>(
        [&](int64_t n, int64_t b) { return exact_offset(n, b * shape_.block_size); });
  }
  if (shape_.format == Format::kInt4ZeroPoints) {
    uint8_t* out = allocate(block_stride() * 8, blocks * 8, 0);
    for (int64_t n = 0; n < shape_.out_features(); ++n) {
      for (int64_t b = 0; b < blocks; ++b) {
        uint8_t& byte = out[(n / 16 * block_stride() + b) * 8 + n % 8];
        byte = static_cast<uint8_t>(byte | of(zero_points_)(n, b) << (n % 16 < 8 ? 0 : 4));
      }
    }
    packed_.zero_points = out;
  }
}

Weights Matrix::packed() const { return packed_; }

Weights Matrix::unpacked(const KernelTable& isa) {
  if (!has_codebook(shape_.format)) return packed_;
  Weights weights = packed_;
  weights.scale_unit = absmax_scale_unit(weights);
  const int64_t panels = panels_of(shape_), count = absmax_panel_scales(weights);
  GuardedBytes scratch(static_cast<size_t>((linear_scratch_bytes(weights) + 63) / 64 * 64));
  memory_.push_back(std::make_unique<GuardedBytes>(static_cast<size_t>(panels * count * 2)));
  auto* scales = memory_.back()->as<uint16_t>();
  for (int64_t p = 0; p < panels; ++p) {
    isa.unpack_absmax(weights, p, scales + p * count, scratch.as<void>());
  }
  weights.scales = scales;
  return weights;
}

Rows::Rows(int64_t rows, int64_t in_features, Fill fill, uint64_t seed, bool grouped)
    : blocks((in_features + 31) / 32),
      codes(static_cast<size_t>(rows * blocks * 32)),
      scales(static_cast<size_t>(rows * blocks * 4)),
      sums(static_cast<size_t>(rows * blocks * 4)),
      rows_(rows),
      grouped_(grouped) {
  Random random(seed);
  float group_scale = 0.0f;
  for (int64_t i = 0; i < rows * blocks; ++i) {
    const bool zero = fill != Fill::kSaturated && random.below(9) == 0;
    const float power = random.below(2) != 0 ? 1.0f : 0.5f;
    const float positive = fill == Fill::kRandom ? 0.001f + random.unit() : power;
    const float scale = fill == Fill::kSaturated ? 1.0f : positive;
    if (i % blocks % kGroupBlocks == 0) group_scale = scale;
    const int halvings = fill == Fill::kPowers ? 0 : random.between(0, 5);
    const float lowered = std::ldexp(group_scale, -halvings);
    const float some = grouped ? lowered : scale;
    scales.as<float>()[i] = zero ? 0.0f : some;
    int32_t sum = 0;
    for (int64_t j = 0; j < 32; ++j) {
      const bool padding = i % blocks * 32 + j >= in_features;
      const bool top = i % 3 == 0 || (i % 3 == 2 && j % 2 == 0);
      const int code = fill == Fill::kSaturated ? (top ? 127 : -127) : random.between(-127, 127);
      codes.as<int8_t>()[i * 32 + j] = static_cast<int8_t>(padding || zero ? 0 : code);
      sum += codes.as<int8_t>()[i * 32 + j];
    }
    sums.as<int32_t>()[i] = sum;
  }
}

Activations Rows::activations() {
  return {rows_, codes.as<int8_t>(), scales.as<float>(), sums.as<int32_t>(), false, grouped_};
}

}  // namespace edgelora::kernels::test
