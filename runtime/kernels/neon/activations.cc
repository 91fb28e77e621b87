// Activations → int8 blocks.
//
//   code = round_half_even(x · (127 / amax)) of 32 values, eight registers; activation_block.h
#include "kernels/activation_block.h"
#include "kernels/neon/neon.h"
#include "kernels/neon/registers.h"

namespace edgelora::kernels::neon {
namespace {

int8x16_t round_16(const float32x4_t* v, float inverse) {
  int32x4_t words[4];
  for (int i = 0; i < 4; ++i) words[i] = vcvtnq_s32_f32(vmulq_n_f32(v[i], inverse));
  const int16x8_t low = vqmovn_high_s32(vqmovn_s32(words[0]), words[1]);
  const int16x8_t high = vqmovn_high_s32(vqmovn_s32(words[2]), words[3]);
  return vqmovn_high_s16(vqmovn_s16(low), high);
}

// A NaN passes through vmaxq; Inf · 0 becomes NaN, and a NaN's integer is 0.
int32_t quantize_full_block(const float* x, int8_t* codes, float* scale) {
  float32x4_t v[8];
  float32x4_t amax = vdupq_n_f32(0.0f);
  for (int i = 0; i < 8; ++i) {
    v[i] = vld1q_f32(x + 4 * i);
    amax = vmaxq_f32(amax, vabsq_f32(v[i]));
  }
  const float largest = vmaxvq_f32(amax);
  const BlockScale block = block_scale_of(largest, largest <= kLargestFinite);
  *scale = block.scale;
  const int8x16_t low = round_16(v, block.inverse), high = round_16(v + 4, block.inverse);
  vst1q_s8(codes, low);
  vst1q_s8(codes + 16, high);
  return vaddlvq_s16(vpadalq_s8(vpaddlq_s8(low), high));
}

}  // namespace

void quantize_activations(const float* x, int64_t in_features, int8_t* codes, float* scales,
                          int32_t* sums) {
  quantize_blocks<quantize_full_block>(x, in_features, codes, scales, sums);
}

}  // namespace edgelora::kernels::neon
