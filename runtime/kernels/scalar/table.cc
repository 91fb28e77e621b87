// The scalar table: plain C++ on any machine.
#include "kernels/scalar/scalar.h"
#include "kernels/panels.h"
#include "kernels/tables.h"

namespace edgelora::kernels::scalar {

const KernelTable kTable = {
    "scalar",
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

}  // namespace edgelora::kernels::scalar
