// The neon table: what every 64-bit ARM has, Cortex-A53 and A72 among them.
#include "kernels/neon/neon.h"
#include "kernels/tables.h"

namespace edgelora::kernels::neon {

const KernelTable kTable = {
    "neon",           quantize_activations, linear,         linear_float,
    side_branch_down, side_branch_up,       dequantize_row, swiglu,
};

}  // namespace edgelora::kernels::neon
