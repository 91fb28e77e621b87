// Functions of the neon_i8mm table that are its own.
#pragma once

#include "kernels/kernels.h"

namespace edgelora::kernels::neon_i8mm {

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch);

}  // namespace edgelora::kernels::neon_i8mm
