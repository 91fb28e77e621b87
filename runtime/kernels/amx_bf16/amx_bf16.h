// Functions of the amx_bf16 table that are its own.
#pragma once

#include "kernels/kernels.h"

namespace edgelora::kernels::amx_bf16 {

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch);

}  // namespace edgelora::kernels::amx_bf16
