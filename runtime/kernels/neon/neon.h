// Functions of the neon table. An ISA whose features include neon's may use them in its own.
#pragma once

#include "kernels/kernels.h"

namespace edgelora::kernels::neon {

void quantize_activations(const float* x, int64_t in_features, int8_t* codes, float* scales,
                          int32_t* sums);
void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch);
void unpack_absmax(const Weights& weights, int64_t panel, uint16_t* scales, void* scratch);
void linear_float(const Weights& weights, const float* x, int64_t rows, int64_t panel_begin,
                  int64_t panel_end, float* y, int64_t y_stride, void* scratch);
void side_branch_down(const Factors& factors, int64_t in_features, float weight, const float* x,
                      float* t);
void side_branch_up(const Factors& factors, int64_t out_features, const float* t,
                    int64_t panel_begin, int64_t panel_end, float* y);
void side_branch_up_int8(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                         int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride);
void dequantize_row(const Weights& weights, int64_t row, float* out);
void swiglu(const float* gate, const float* up, int64_t n, float* out);
void rms_norm(const float* x, const float* weight, int64_t n, float epsilon, float* out);
float largest(const float* x, int64_t n);
float exp_minus(float* x, int64_t n, float most);
void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* out);

}  // namespace edgelora::kernels::neon
