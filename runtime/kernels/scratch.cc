// Bytes of one thread's scratch; scratch.h says what lies where.
#include "kernels/scratch.h"

namespace edgelora::kernels {

int64_t linear_scratch_bytes(const Weights& weights) { return scratch_layout(weights).bytes; }

}  // namespace edgelora::kernels
