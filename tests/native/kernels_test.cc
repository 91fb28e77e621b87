// Tests of every kernel of every ISA that runs here, against references written from the formulas.
//
//   kernels_test [ISA]    the one that must be this machine's best
#include "kernels_test.h"

#include <cstdio>
#include <cstring>

#include "kernels/features.h"
#include "kernels/tables.h"
#include "kernels_test_check.h"

#ifdef EDGELORA_EMULATED
namespace edgelora::kernels::avx512_vnni_emulated {
extern const KernelTable kTable;
}
namespace edgelora::kernels::amx_bf16_emulated {
extern const KernelTable kTable;
}
namespace edgelora::kernels::avx_vnni_emulated {
extern const KernelTable kTable;
}
#endif

namespace edgelora::kernels::test {
namespace {

// Null if there is none.
const KernelTable* emulated(const std::string& isa) {
#ifdef EDGELORA_EMULATED
  if (isa == "avx_vnni") return &avx_vnni_emulated::kTable;
  if (isa == "avx512_vnni") return &avx512_vnni_emulated::kTable;
  if (isa == "amx_bf16") return &amx_bf16_emulated::kTable;
#else
  (void)isa;
#endif
  return nullptr;
}

TestedIsa tested(const std::string& isa, const KernelTable* table, const char* how) {
  const Arithmetic few = isa == "avx2" ? Arithmetic::kLevels : Arithmetic::kBytes;
  return {isa + how, table, few, isa == "amx_bf16" ? Arithmetic::kBfloat16 : few};
}

// Those of this machine, the best first, then what stands in for those that it lacks.
std::vector<TestedIsa> isas_of_this_machine() {
  std::vector<TestedIsa> isas, instead;
  const Features features = detect_features();
  for (int i = 0; isa_name(i) != nullptr; ++i) {
    const std::string name = isa_name(i);
    if (isa_supported(i, features)) {
      isas.push_back(tested(name, select_kernels(features, isa_name(i)), ""));
    } else if (emulated(name) != nullptr) {
      instead.push_back(tested(name, emulated(name), " (emulated)"));
    } else {
      std::printf("not on this machine: %s\n", isa_name(i));
    }
  }
  isas.insert(isas.end(), instead.begin(), instead.end());
  return isas;
}

struct Family {
  const char* name;
  void (*run)(const std::vector<TestedIsa>& isas);
};

constexpr Family kFamilies[] = {
    {"selection", test_selection},
    {"kernels broken on purpose", test_broken},
    {"linear: formats, blocks, shapes", test_linear},
    {"linear: saturated codes", test_linear_saturated},
    {"linear: zero blocks", test_linear_zero},
    {"linear: rows alone", test_linear_rows_alone},
    {"linear: panel ranges", test_linear_panel_ranges},
    {"linear: room between panels", test_linear_room},
    {"linear: NaN and Inf", test_linear_not_a_number},
    {"linear_float: formats, blocks, shapes", test_linear_float},
    {"unpack_absmax", test_unpack_absmax},
    {"codebook_rounding", test_codebook_rounding},
    {"dequantize_row", test_dequantize_row},
    {"quantize_activations", test_quantize_activations},
    {"side branch", test_side_branch},
    {"side branch in int8", test_packed_factors},
    {"swiglu", test_swiglu},
    {"rms_norm", test_rms_norm},
    {"largest", test_largest},
    {"exp_minus", test_exp_minus},
    {"rotate", test_rotate},
};

}  // namespace
}  // namespace edgelora::kernels::test

int main(int argc, char** argv) {
  using namespace edgelora::kernels::test;
  const std::vector<TestedIsa> isas = isas_of_this_machine();
  for (const TestedIsa& isa : isas) std::printf("tested: %s\n", isa.name.c_str());
  if (argc > 1) KERNELS_CHECK(isas[0].name == argv[1], "the best ISA is %s", isas[0].name.c_str());
  for (const Family& family : kFamilies) {
    const Counts before = counts();
    family.run(isas);
    std::printf("%-40s %lld passed, %lld failed\n", family.name,
                static_cast<long long>(counts().passed - before.passed),
                static_cast<long long>(counts().failed - before.failed));
    std::fflush(stdout);
  }
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(counts().passed),
              static_cast<long long>(counts().failed));
  return counts().failed == 0 ? 0 : 1;
}
