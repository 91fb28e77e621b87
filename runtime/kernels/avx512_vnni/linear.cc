// `linear` in 512-bit registers: a register is the 16 rows of a panel. vnni_linear.h has the rest,
// and panel_pairs.h several rows of the formats that have no zero points or offsets. Of those that
// do 12 rows of x at a time: 12 chains of vpdpbusd, each with its broadcast of x from memory.
#include "kernels/avx512_vnni/avx512_vnni.h"
#include "kernels/avx512_vnni/panel_pairs.h"
#include "kernels/absmax_scales.h"

namespace edgelora::kernels::avx512_vnni {

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch) {
  drive_row_groups<PanelPairs>(weights, x, panel_begin, panel_end, y, y_stride, scratch);
}

void unpack_absmax(const Weights& weights, int64_t panel, uint16_t* scales, void* scratch) {
  unpack_absmax_panel(weights, panel, codebook(weights.format).byte_scale, store_half16, scales,
                      scratch);
}

}  // namespace edgelora::kernels::avx512_vnni
