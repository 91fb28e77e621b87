// Matrices for the tests: values as the formats' definition gives them, and their packed bytes.
// Written from ARCHITECTURE.md alone; nothing of runtime/kernels but the struct `Weights` is used.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels_test_check.h"

namespace edgelora::kernels::test {

enum class Fill {
  kRandom,
  kPowers,     // random codes, scales that are powers of two: float sums are exact
  kSaturated,  // codes at their ends, scales 1
  kZero,       // as kPowers, but half of the scales are zero
};

struct Shape {
  Format format;
  int64_t in_features;
  std::vector<int64_t> slices;  // out_features of each
  int64_t block_size;
  double absmax = 0;  // of nf4's and fp4's exact fills, a power of two less or more
  int64_t room = 0;  // K, a multiple of 128, that panels have room for beyond in_features
  bool exact_offsets = false;  // int4 offsets in float32, near those in float16

  int64_t out_features() const;
  int64_t blocks() const { return (in_features + block_size - 1) / block_size; }
  std::string name() const;
};

double half_value(uint16_t half);
uint16_t half_bits(double value);  // the value must be representable

// One quantized matrix. All per-row arrays are [N, …], unpacked.
class Matrix {
 public:
  Matrix(const Shape& shape, Fill fill, uint64_t seed);

  const Shape& shape() const { return shape_; }
  // scale · (code − zero point) + offset, as the four numbers.
  int code(int64_t n, int64_t k) const;  // int formats: the integer; nf4, fp4: 0…15
  int zero_point(int64_t n, int64_t k) const;
  double scale(int64_t n, int64_t k) const;  // nf4, fp4: absmax
  double offset(int64_t n, int64_t k) const;        // in float16
  float exact_offset(int64_t n, int64_t k) const;
  float weight(int64_t n, int64_t k) const {  // dequantized as numpy does
    return weights_[static_cast<size_t>(n * shape_.in_features + k)];
  }

  Weights packed() const;  // points into this object
  Weights unpacked(
      const KernelTable& isa);  // the same; nf4, fp4 with the scales of this ISA's `linear`

 private:
  void fill_codes(Fill fill, Random& random);
  void fill_scales(Fill fill, Random& random);
  void fill_absmax(Fill fill, Random& random);
  float dequantized(int64_t n, int64_t k) const;

  void pack();
  void pack_floats();
  void pack_codes();
  void pack_absmax();
  void pack_scales();
  uint8_t* allocate(int64_t stride, int64_t used, size_t slack);
  // Half of the shapes: misaligned by 2.
  size_t slack() const { return static_cast<size_t>(shape_.out_features() % 2 * 2); }
  template <class T, class Value>
  T* pack_blocks(Value value);
  int64_t block_stride() const { return shape_.blocks() + shape_.room / shape_.block_size; }
  int64_t absmax_index(int64_t n, int64_t k, int64_t* slice) const;

  Shape shape_;
  std::vector<int> codes_;         // [N, K]
  std::vector<float> weights_;     // [N, K]
  std::vector<uint16_t> scales_;   // [N, blocks]
  std::vector<int> zero_points_;   // [N, blocks]
  std::vector<uint16_t> offsets_;  // [N, blocks]
  std::vector<uint8_t> absmax_;    // all slices, each padded to 256
  std::vector<float> nested_, absmax_offset_, table_;
  std::vector<std::unique_ptr<GuardedBytes>> memory_;  // packed tensors
  Weights packed_{};
};

// Quantized activations in guarded memory.
struct Rows {
  Rows(int64_t rows, int64_t in_features, Fill fill, uint64_t seed, bool grouped = false);

  int64_t blocks;
  GuardedBytes codes, scales, sums;
  Activations activations();
  int code(int64_t m, int64_t k) { return codes.as<int8_t>()[m * blocks * 32 + k]; }
  double scale(int64_t m, int64_t b) {
    return static_cast<double>(scales.as<float>()[m * blocks + b]);
  }

 private:
  int64_t rows_;
  bool grouped_;
};

double codebook_value(Format format, int code);  // nf4 or fp4

}  // namespace edgelora::kernels::test
