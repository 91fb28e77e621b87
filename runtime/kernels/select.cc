// Which table serves a CPU: a pure function of its feature mask.
#include <cstring>

#include "kernels/features.h"
#include "kernels/kernels.h"
#include "kernels/tables.h"

namespace edgelora::kernels {
namespace {

struct Isa {
  const char* name;
  Features needs;
  const KernelTable* table;
};

constexpr Isa kIsas[] = {
#define EDGELORA_ISA(isa, features, flags, arch) {#isa, features, &isa::kTable},
#include "kernels/kernels.inc"
#undef EDGELORA_ISA
};
constexpr int kIsaCount = static_cast<int>(sizeof(kIsas) / sizeof(kIsas[0]));

bool runs_on(const Isa& isa, Features features) { return (isa.needs & ~features) == 0; }

}  // namespace

const KernelTable* select_kernels(Features features, const char* forced) {
  for (const Isa& isa : kIsas) {
    const bool wanted = forced == nullptr || std::strcmp(forced, isa.name) == 0;
    if (wanted && runs_on(isa, features)) return isa.table;
  }
  return nullptr;
}

const char* isa_name(int index) {
  return index >= 0 && index < kIsaCount ? kIsas[index].name : nullptr;
}

bool isa_supported(int index, Features features) {
  return index >= 0 && index < kIsaCount && runs_on(kIsas[index], features);
}

}  // namespace edgelora::kernels
