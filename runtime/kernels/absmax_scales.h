// absmax of nf4 and fp4 as float16 scales, of the ISA's table of bytes: once, when weights are
// loaded.
#pragma once

#include "kernels/codebooks.h"
#include "kernels/scratch.h"

namespace edgelora::kernels {
namespace {

// table_scale: the integer that stands for the value 1. store_halves(from, to): 16 floats.
template <class StoreHalves>
void unpack_absmax_panel(const Weights& weights, int64_t panel, float table_scale,
                         StoreHalves store_halves, uint16_t* scales, void* scratch) {
  auto* absmax =
      reinterpret_cast<float*>(static_cast<char*>(scratch) + scratch_layout(weights).absmax);
  decode_absmax_panel(weights, panel, 1.0f / (weights.scale_unit * table_scale), absmax);
  for (int64_t i = 0; i < scale_blocks(weights) * kPanelRows; i += kPanelRows) {
    store_halves(absmax + i, scales + i);
  }
}

}  // namespace
}  // namespace edgelora::kernels
