// Functions of the avx512_vnni table that are its own.
#pragma once

#include "kernels/kernels.h"

namespace edgelora::kernels::avx512_vnni {

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch);
void unpack_absmax(const Weights& weights, int64_t panel, uint16_t* scales, void* scratch);

void quantize_activations(const float* x, int64_t in_features, int8_t* codes, float* scales,
                          int32_t* sums);
void quantize_groups(const float* x, int64_t in_features, int8_t* codes, float* scales,
                     int32_t* sums);
void side_branch_up_int8(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                         int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride);
void swiglu(const float* gate, const float* up, int64_t n, float* out);
float largest(const float* x, int64_t n);
float exp_minus(float* x, int64_t n, float most);

}  // namespace edgelora::kernels::avx512_vnni
