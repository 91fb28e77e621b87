// The linear of one NEON folder, a function for each format and phase: arm_kernels.py looks for the
// inner loop in each. Compiled with -DEDGELORA_ISA=<folder> and that folder's flags.
#define EDGELORA_QUOTED(name) #name
#define EDGELORA_LINEAR(isa) EDGELORA_QUOTED(kernels/isa/linear.cc)
#include EDGELORA_LINEAR(EDGELORA_ISA)

#define EDGELORA_WHOLE extern "C" __attribute__((flatten)) void

namespace edgelora::kernels::EDGELORA_ISA {

#define EDGELORA_PHASES(name, format)                                                 \
  EDGELORA_WHOLE decode_##name(const PanelView& w, const RowTile& x, float* acc) {    \
    if (x.rows != 1) __builtin_unreachable();                                         \
    Isa::panel<Format::format>(w, x, acc);                                            \
  }                                                                                   \
  EDGELORA_WHOLE prefill_##name(const PanelView& w, const Isa::Rows& x, float* acc) { \
    if (x.rows < 16) __builtin_unreachable();                                         \
    Isa::panel<Format::format>(w, x, acc);                                            \
  }
EDGELORA_PHASES(int4, kInt4)
EDGELORA_PHASES(int4_zero_points, kInt4ZeroPoints)
EDGELORA_PHASES(int4_offsets, kInt4Offsets)
EDGELORA_PHASES(int8, kInt8)
EDGELORA_PHASES(nf4, kNf4)

}  // namespace edgelora::kernels::EDGELORA_ISA
