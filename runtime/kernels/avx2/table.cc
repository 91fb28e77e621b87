// The avx2 table: AVX2, FMA and F16C.
#include "kernels/avx2/avx2.h"
#include "kernels/panels.h"
#include "kernels/tables.h"

namespace edgelora::kernels::avx2 {

const KernelTable kTable = {
    "avx2",
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

}  // namespace edgelora::kernels::avx2
