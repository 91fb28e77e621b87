// The families of kernel tests; kernels_test.cc runs them for each ISA.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace edgelora::kernels::test {

// What an ISA's `linear` multiplies: integers, with values of nf4 and fp4 as bytes or as seven-bit
// levels, or scaled bfloat16.
enum class Arithmetic { kBytes, kLevels, kBfloat16 };

struct TestedIsa {
  std::string name;
  const KernelTable* table;
  Arithmetic few;  // rows of x
  Arithmetic many = few;
  static constexpr int64_t kMany = 17;

  Arithmetic of(int64_t rows) const { return rows < kMany ? few : many; }
};

void test_linear(const std::vector<TestedIsa>& isas);
void test_linear_saturated(const std::vector<TestedIsa>& isas);
void test_linear_zero(const std::vector<TestedIsa>& isas);
void test_linear_rows_alone(const std::vector<TestedIsa>& isas);
void test_linear_panel_ranges(const std::vector<TestedIsa>& isas);
void test_linear_room(const std::vector<TestedIsa>& isas);
void test_linear_not_a_number(const std::vector<TestedIsa>& isas);
void test_linear_float(const std::vector<TestedIsa>& isas);
void test_unpack_absmax(const std::vector<TestedIsa>& isas);
void test_codebook_rounding(const std::vector<TestedIsa>& isas);
void test_dequantize_row(const std::vector<TestedIsa>& isas);
void test_quantize_activations(const std::vector<TestedIsa>& isas);
void test_side_branch(const std::vector<TestedIsa>& isas);
void test_packed_factors(const std::vector<TestedIsa>& isas);
void test_swiglu(const std::vector<TestedIsa>& isas);
void test_rms_norm(const std::vector<TestedIsa>& isas);
void test_largest(const std::vector<TestedIsa>& isas);
void test_exp_minus(const std::vector<TestedIsa>& isas);
void test_rotate(const std::vector<TestedIsa>& isas);
void test_broken(const std::vector<TestedIsa>& isas);
void test_selection(const std::vector<TestedIsa>& isas);

}  // namespace edgelora::kernels::test
