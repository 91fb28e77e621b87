// Features of this machine. x86: what the CPU has (cpuid) and what the OS saves (xgetbv). ARM: what
// the OS says that every core has.
#include "kernels/features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace edgelora::kernels {

#if defined(__x86_64__)
namespace {

constexpr uint32_t kOsSavesYmm = 0x06;  // XCR0: xmm and upper ymm halves
constexpr uint32_t kOsSavesZmm = 0xe6;  // … and opmask, upper zmm halves, zmm16–31
constexpr uint32_t kOsSavesTiles = 0x600e6;  // … and the tiles' shapes and bytes

struct Leaf {
  uint32_t eax, ebx, ecx, edx;
};

Leaf cpuid_leaf(uint32_t number, uint32_t subleaf = 0) {
  Leaf leaf{};
  __get_cpuid_count(number, subleaf, &leaf.eax, &leaf.ebx, &leaf.ecx, &leaf.edx);
  return leaf;
}

uint32_t saved_state() {
  uint32_t eax = 0, edx = 0;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return eax;
}

Features bit_if(uint32_t word, int bit, Features feature) {
  return (word >> bit & 1u) != 0 ? feature : 0;
}

// Linux gives a process the tiles when it asks (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

Features detect_features() {
  const Leaf one = cpuid_leaf(1);
  const bool has_xgetbv = (one.ecx >> 27 & 1u) != 0;
  const uint32_t saved = has_xgetbv ? saved_state() : 0;
  const Leaf seven = cpuid_leaf(7);
  const Leaf seven_one = seven.eax >= 1 ? cpuid_leaf(7, 1) : Leaf{};
  Features found = 0;
  if ((saved & kOsSavesYmm) == kOsSavesYmm) {
    found |= bit_if(one.ecx, 12, kFma) | bit_if(one.ecx, 29, kF16c) | bit_if(seven.ebx, 5, kAvx2) |
             bit_if(seven_one.eax, 4, kAvxVnni);
  }
  if ((saved & kOsSavesZmm) == kOsSavesZmm) {
    found |= bit_if(seven.ebx, 16, kAvx512f) | bit_if(seven.ebx, 17, kAvx512dq) |
             bit_if(seven.ebx, 30, kAvx512bw) | bit_if(seven.ebx, 31, kAvx512vl) |
             bit_if(seven.ecx, 11, kAvx512vnni);
  }
  const bool has_amx =
      (seven.edx >> 22 & seven.edx >> 24 & seven_one.eax >> 5 & 1u) != 0;  // bf16, tile
  if (has_amx && (saved & kOsSavesTiles) == kOsSavesTiles && may_use_tiles()) found |= kAmxBf16;
  return found;
}
#elif defined(__aarch64__) && defined(__linux__)
namespace {

// The kernel's numbers (asm/hwcap.h); older headers lack the last.
constexpr unsigned long kHwcapAsimd = 1ul << 1;
constexpr unsigned long kHwcapAsimdDp = 1ul << 20;
constexpr unsigned long kHwcap2I8mm = 1ul << 13;

}  // namespace

Features detect_features() {
  const unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
  Features found = 0;
  if ((hwcap & kHwcapAsimd) != 0) found |= kNeon;
  if ((hwcap & kHwcapAsimdDp) != 0) found |= kDotprod;
  if ((hwcap2 & kHwcap2I8mm) != 0) found |= kI8mm;
  return found;
}
#elif defined(__aarch64__) && defined(__APPLE__)
namespace {

bool has(const char* feature) {  // a name the system does not know is a feature it does not have
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}

}  // namespace

Features detect_features() {
  Features found = kNeon;
  if (has("hw.optional.arm.FEAT_DotProd")) found |= kDotprod;
  if (has("hw.optional.arm.FEAT_I8MM")) found |= kI8mm;
  return found;
}
#elif defined(__aarch64__)
Features detect_features() { return kNeon; }
#else
Features detect_features() { return 0; }
#endif

}  // namespace edgelora::kernels
