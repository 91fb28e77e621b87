// Every ISA's table, declared from kernels.inc.
#pragma once

#include "kernels/kernels.h"

namespace edgelora::kernels {

#define EDGELORA_ISA(isa, features, flags, arch) \
  namespace isa {                                \
  extern const KernelTable kTable;               \
  }
#include "kernels/kernels.inc"
#undef EDGELORA_ISA

}  // namespace edgelora::kernels
