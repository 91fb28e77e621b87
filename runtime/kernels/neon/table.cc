// The neon table: what every 64-bit ARM has, Cortex-A53 and A72 among them.
#include "kernels/neon/neon.h"
#include "kernels/panels.h"
#include "kernels/tables.h"

namespace edgelora::kernels::neon {

const KernelTable kTable = {
    "neon",
    kStripRows,
    quantize_activations,
    nullptr,  // quantize_groups
    linear,
    unpack_absmax,
    linear_float,
    side_branch_down,
    side_branch_up,
    side_branch_up_int8,
    dequantize_row,
    swiglu,
    rms_norm,
    largest,
    exp_minus,
    rotate,
};

}  // namespace edgelora::kernels::neon
