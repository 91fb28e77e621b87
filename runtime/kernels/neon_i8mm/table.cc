// The neon_i8mm table: its own integer linear, neon_dotprod's int8 side branch. All else is neon's:
// those functions have no integer dot products.
#include "kernels/neon_i8mm/neon_i8mm.h"
#include "kernels/neon/neon.h"
#include "kernels/neon_dotprod/neon_dotprod.h"
#include "kernels/panels.h"
#include "kernels/tables.h"

namespace edgelora::kernels::neon_i8mm {

extern const KernelTable kTable = {
    "neon_i8mm",
    kStripRows,
    neon::quantize_activations,
    nullptr,  // quantize_groups
    linear,
    neon::unpack_absmax,
    neon::linear_float,
    neon::side_branch_down,
    neon::side_branch_up,
    neon_dotprod::side_branch_up_int8,
    neon::dequantize_row,
    neon::swiglu,
    neon::rms_norm,
    neon::largest,
    neon::exp_minus,
    neon::rotate,
};

}  // namespace edgelora::kernels::neon_i8mm
