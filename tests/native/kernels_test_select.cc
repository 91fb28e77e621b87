// Selection from feature masks: of known CPUs, and of dumps that were recorded on machines
// (tests/golden/cpuinfo).
#include <cstring>
#include <fstream>
#include <sstream>

#include "kernels/features.h"
#include "kernels_test.h"
#include "kernels_test_check.h"

namespace edgelora::kernels::test {
namespace {

struct Device {
  const char* name;
  Features features;
  const char* isa;
};

struct Dump {
  const char* file;
  const char* isa;
};

struct NamedFeature {
  const char* name;  // as /proc/cpuinfo has it
  Features feature;
};

#if defined(__x86_64__)
constexpr Features kHaswell = kAvx2 | kFma | kF16c;
constexpr Features kSkylakeServer = kHaswell | kAvx512f | kAvx512bw | kAvx512vl | kAvx512dq;

constexpr Device kDevices[] = {
    {"Core 2 (no AVX)", 0, "scalar"},
    {"Ivy Bridge (F16C alone)", kF16c, "scalar"},
    {"AVX2 without FMA", kAvx2 | kF16c, "scalar"},
    {"Haswell", kHaswell, "avx2"},
    {"Zen 3", kHaswell, "avx2"},
    {"Skylake server (AVX-512 without VNNI)", kSkylakeServer, "avx2"},
    {"Cascade Lake", kSkylakeServer | kAvx512vnni, "avx512_vnni"},
    {"Zen 5", kSkylakeServer | kAvx512vnni | kAvxVnni, "avx512_vnni"},
    {"Sapphire Rapids", kSkylakeServer | kAvx512vnni | kAvxVnni | kAmxBf16, "amx_bf16"},
    {"AMX without AVX-512", kHaswell | kAmxBf16, "avx2"},
    {"Alder Lake", kHaswell | kAvxVnni, "avx_vnni"},
    {"VNNI, but the OS saves no zmm", kHaswell, "avx2"},
    {"another architecture's features", kNeon | kDotprod | kI8mm, "scalar"},
};
constexpr Device kLacking[] = {  // the ISA forced on features that do not suffice
    {"Haswell", kHaswell, "avx512_vnni"},
    {"Cascade Lake", kSkylakeServer | kAvx512vnni, "amx_bf16"},
    {"Haswell", kHaswell, "avx_vnni"},
    {"AVX2 without FMA", kAvx2, "avx2"},
};
constexpr Dump kDumps[] = {
    {"amd-epyc-zen3.txt", "avx2"},
    {"amd-epyc-zen5.txt", "avx512_vnni"},
    {"core-i7-13700hx.txt", "avx_vnni"},
    {"xeon-ice-lake.txt", "avx512_vnni"},
    {"xeon-emerald-rapids.txt", "amx_bf16"},
};
constexpr NamedFeature kNames[] = {
    {"avx2", kAvx2},         {"fma", kFma},           {"f16c", kF16c},
    {"avx512f", kAvx512f},   {"avx512bw", kAvx512bw}, {"avx512vl", kAvx512vl},
    {"avx512dq", kAvx512dq}, {"avx512_vnni", kAvx512vnni},
    {"avx_vnni", kAvxVnni},  {"amx_bf16", kAmxBf16},
};
#elif defined(__aarch64__)
constexpr Device kDevices[] = {
    {"no vector unit", 0, "scalar"},
    {"Cortex-A53, A72 (Raspberry Pi Zero 2 W, 3, 4)", kNeon, "neon"},
    {"Cortex-A55, A76, X1 (Raspberry Pi 5)", kNeon | kDotprod, "neon_dotprod"},
    {"Cortex-A510, A715, X3 (Pixel 8), Apple A16", kNeon | kDotprod | kI8mm, "neon_i8mm"},
    {"i8mm without dotprod", kNeon | kI8mm, "neon"},
    {"another architecture's features", kAvx2 | kFma | kF16c, "scalar"},
};
constexpr Device kLacking[] = {
    {"Cortex-A72", kNeon, "neon_dotprod"},
    {"Cortex-A76", kNeon | kDotprod, "neon_i8mm"},
};
constexpr Dump kDumps[] = {
    {"qemu-cortex-a53.txt", "neon"},
    {"qemu-cortex-a76.txt", "neon_dotprod"},
    {"qemu-max.txt", "neon_i8mm"},
    {"raspberry-pi-3.txt", "neon"},
    {"raspberry-pi-4.txt", "neon"},
    {"raspberry-pi-5.txt", "neon_dotprod"},
    {"agilex-5.txt", "neon_dotprod"},
    {"neoverse-n1.txt", "neon_dotprod"},
    {"snapdragon-8-gen-3.txt", "neon_i8mm"},
};
constexpr NamedFeature kNames[] = {{"asimd", kNeon}, {"asimddp", kDotprod}, {"i8mm", kI8mm}};
#endif

bool same(const char* a, const char* b) { return std::strcmp(a, b) == 0; }

// From the line of features of a recorded /proc/cpuinfo.
Features recorded_features(const std::string& file) {
  std::ifstream dump(std::string(EDGELORA_CPUINFO_DUMPS) + "/" + file);
  Features found = 0;
  for (std::string line; std::getline(dump, line);) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
    std::istringstream words(line);
    for (std::string word; words >> word;) {
      for (const NamedFeature& named : kNames) {
        if (word == named.name) found |= named.feature;
      }
    }
  }
  return found;
}

void check_device(const Device& device) {
  const KernelTable* table = select_kernels(device.features, nullptr);
  KERNELS_CHECK(table != nullptr && same(table->isa, device.isa), "%s", device.name);
  KERNELS_CHECK(table == select_kernels(device.features, device.isa), "%s forced", device.name);
  KERNELS_CHECK(same(select_kernels(device.features, "scalar")->isa, "scalar"), "%s", device.name);
}

}  // namespace

void test_selection(const std::vector<TestedIsa>& isas) {
  for (const Device& device : kDevices) check_device(device);
  for (const Dump& dump : kDumps) {
    const Features features = recorded_features(dump.file);
    KERNELS_CHECK(features != 0, "%s: no features read", dump.file);
    check_device({dump.file, features, dump.isa});
  }
  for (const Device& device : kLacking) {
    KERNELS_CHECK(select_kernels(device.features, device.isa) == nullptr, "%s on %s", device.isa,
                  device.name);
  }
  KERNELS_CHECK(select_kernels(~Features{0}, "avx3") == nullptr, "unknown name");
  KERNELS_CHECK(select_kernels(~Features{0}, "") == nullptr, "empty name");
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
