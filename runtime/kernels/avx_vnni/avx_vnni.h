// Functions of the avx_vnni table that are its own.
#pragma once

#include "kernels/kernels.h"

namespace edgelora::kernels::avx_vnni {

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch);
void unpack_absmax(const Weights& weights, int64_t panel, uint16_t* scales, void* scratch);

}  // namespace edgelora::kernels::avx_vnni
