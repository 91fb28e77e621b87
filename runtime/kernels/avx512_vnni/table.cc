// The avx512_vnni table: its own integer linear and what a prefill spends time on. All else is
// avx2's, whose features it includes.
#include "kernels/avx512_vnni/avx512_vnni.h"
#include "kernels/avx2/avx2.h"
#include "kernels/panels.h"
#include "kernels/tables.h"

namespace edgelora::kernels::avx512_vnni {

extern const KernelTable kTable = {
    "avx512_vnni",
    kStripRows,
    quantize_activations,
    quantize_groups,
    linear,
    unpack_absmax,
    avx2::linear_float,
    avx2::side_branch_down,
    avx2::side_branch_up,
    side_branch_up_int8,
    avx2::dequantize_row,
    swiglu,
    avx2::rms_norm,
    largest,
    exp_minus,
    avx2::rotate,
};

}  // namespace edgelora::kernels::avx512_vnni
