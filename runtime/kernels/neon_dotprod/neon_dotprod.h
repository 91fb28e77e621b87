// Functions of the neon_dotprod table that are its own. neon_i8mm uses its side branch too.
#pragma once

#include "kernels/kernels.h"

namespace edgelora::kernels::neon_dotprod {

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch);
void side_branch_up_int8(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                         int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride);

}  // namespace edgelora::kernels::neon_dotprod
