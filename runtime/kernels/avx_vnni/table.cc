// The avx_vnni table: its own integer linear. All else is avx2's, whose features it includes.
#include "kernels/avx_vnni/avx_vnni.h"
#include "kernels/avx2/avx2.h"
#include "kernels/panels.h"
#include "kernels/tables.h"

namespace edgelora::kernels::avx_vnni {

extern const KernelTable kTable = {
    "avx_vnni",
    kStripRows,
    avx2::quantize_activations,
    nullptr,  // quantize_groups
    linear,
    unpack_absmax,
    avx2::linear_float,
    avx2::side_branch_down,
    avx2::side_branch_up,
    avx2::side_branch_up_int8,
    avx2::dequantize_row,
    avx2::swiglu,
    avx2::rms_norm,
    avx2::largest,
    avx2::exp_minus,
    avx2::rotate,
};

}  // namespace edgelora::kernels::avx_vnni
