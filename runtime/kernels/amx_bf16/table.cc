// The amx_bf16 table: its own integer linear. All else is avx2's, as avx512_vnni's is.
#include "kernels/avx2/avx2.h"
#include "kernels/amx_bf16/amx_bf16.h"
#include "kernels/tables.h"

namespace edgelora::kernels::amx_bf16 {

extern const KernelTable kTable = {
    "amx_bf16",
    avx2::quantize_activations,
    linear,
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

}  // namespace edgelora::kernels::amx_bf16
