// Selection from feature masks recorded on devices.
#include <cstring>

#include "kernels/features.h"
#include "kernels_test.h"
#include "kernels_test_check.h"

namespace edgelora::kernels::test {
namespace {

constexpr Features kHaswell = kAvx2 | kFma | kF16c;
constexpr Features kSkylakeServer = kHaswell | kAvx512f | kAvx512bw | kAvx512vl | kAvx512dq;

struct Device {
  const char* name;
  Features features;
  const char* isa;
};

constexpr Device kDevices[] = {
    {"Core 2 (no AVX)", 0, "scalar"},
    {"Ivy Bridge (F16C alone)", kF16c, "scalar"},
    {"AVX2 without FMA", kAvx2 | kF16c, "scalar"},
    {"Haswell", kHaswell, "avx2"},
    {"Zen 3", kHaswell, "avx2"},
    {"Skylake server (AVX-512 without VNNI)", kSkylakeServer, "avx2"},
    {"Cascade Lake", kSkylakeServer | kAvx512vnni, "avx512_vnni"},
    {"Zen 5", kSkylakeServer | kAvx512vnni | kAvxVnni, "avx512_vnni"},
    {"Alder Lake", kHaswell | kAvxVnni, "avx_vnni"},
    {"VNNI, but the OS saves no zmm", kHaswell, "avx2"},
};

bool same(const char* a, const char* b) { return std::strcmp(a, b) == 0; }

}  // namespace

void test_selection(const std::vector<TestedIsa>& isas) {
  for (const Device& device : kDevices) {
    const KernelTable* table = select_kernels(device.features, nullptr);
    KERNELS_CHECK(table != nullptr && same(table->isa, device.isa), "%s", device.name);
    KERNELS_CHECK(table == select_kernels(device.features, device.isa), "%s forced", device.name);
    KERNELS_CHECK(same(select_kernels(device.features, "scalar")->isa, "scalar"), "%s",
                  device.name);
  }
  KERNELS_CHECK(select_kernels(~Features{0}, "avx3") == nullptr, "unknown name");
  KERNELS_CHECK(select_kernels(~Features{0}, "") == nullptr, "empty name");
  KERNELS_CHECK(select_kernels(kHaswell, "avx512_vnni") == nullptr, "features lack it");
  KERNELS_CHECK(select_kernels(kHaswell, "avx_vnni") == nullptr, "features lack it");
  KERNELS_CHECK(select_kernels(kAvx2, "avx2") == nullptr, "features lack FMA");
  KERNELS_CHECK(isa_name(-1) == nullptr && !isa_supported(-1, ~Features{0}), "before the first");
  int count = 0;
  while (isa_name(count) != nullptr) {
    const KernelTable* table = select_kernels(~Features{0}, isa_name(count));
    KERNELS_CHECK(table != nullptr && same(table->isa, isa_name(count)), "%s", isa_name(count));
    KERNELS_CHECK(isa_supported(count, ~Features{0}), "%s", isa_name(count));
    ++count;
  }
  KERNELS_CHECK(!isa_supported(count, ~Features{0}), "past the last");
  KERNELS_CHECK(same(isa_name(count - 1), "scalar") && isa_supported(count - 1, 0), "scalar");
  for (const TestedIsa& isa : isas) {
    KERNELS_CHECK(isa.table != nullptr, "%s has no table", isa.name.c_str());
  }
}

}  // namespace edgelora::kernels::test
