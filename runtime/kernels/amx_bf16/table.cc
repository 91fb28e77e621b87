// The amx_bf16 table: its own linear. All else is avx512_vnni's.
#include "kernels/amx_bf16/amx_bf16.h"
#include "kernels/avx2/avx2.h"
#include "kernels/avx512_vnni/avx512_vnni.h"
#include "kernels/panels.h"
#include "kernels/tables.h"

namespace edgelora::kernels::amx_bf16 {

extern const KernelTable kTable = {
    "amx_bf16",
    kWideRows,
    avx512_vnni::quantize_activations,
    avx512_vnni::quantize_groups,
    linear,
    avx512_vnni::unpack_absmax,
    avx2::linear_float,
    avx2::side_branch_down,
    avx2::side_branch_up,
    avx512_vnni::side_branch_up_int8,
    avx2::dequantize_row,
    avx512_vnni::swiglu,
    avx2::rms_norm,
    avx512_vnni::largest,
    avx512_vnni::exp_minus,
    avx2::rotate,
};

}  // namespace edgelora::kernels::amx_bf16
