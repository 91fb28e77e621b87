// The neon_dotprod table: its own integer linear and side branch. All else is neon's: those
// functions have no integer dot products.
#include "kernels/neon_dotprod/neon_dotprod.h"
#include "kernels/neon/neon.h"
#include "kernels/panels.h"
#include "kernels/tables.h"

namespace edgelora::kernels::neon_dotprod {

extern const KernelTable kTable = {
    "neon_dotprod",
    kStripRows,
    neon::quantize_activations,
    nullptr,  // quantize_groups
    linear,
    neon::unpack_absmax,
    neon::linear_float,
    neon::side_branch_down,
    neon::side_branch_up,
    side_branch_up_int8,
    neon::dequantize_row,
    neon::swiglu,
    neon::rms_norm,
    neon::largest,
    neon::exp_minus,
    neon::rotate,
};

}  // namespace edgelora::kernels::neon_dotprod
