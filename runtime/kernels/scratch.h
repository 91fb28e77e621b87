// The scratch of `linear` and `linear_float`: offsets in bytes, each a multiple of 64.
#pragma once

#include "kernels/panels.h"

namespace edgelora::kernels {
namespace {

constexpr int64_t kTileNotes = 6144;  // bytes, for the largest of the structs that tell it

struct ScratchLayout {
  int64_t absmax;  // nf4, fp4: float [K / absmax_step, 16], of one panel
  int64_t terms;   // int32 or float [Kp / 32, kRowTile]; neon_i8mm: twice as many
  int64_t scales;  // float [Kp / 32, kRowTile]; neon_i8mm: twice as many
  int64_t group_scales;  // magic_steps.h: float [groups of Kp / 32, kRowTile],
  int64_t magics;        // float [groups, kRowTile, 4]
  int64_t magic_steps;   // int32 or float [groups, kRowTile, 4]
  int64_t codes;   // int8 [Kp / 32, kRowTile, 32]
  int64_t starts;  // nf4, fp4: int16 [Kp / 32, kRowTile, 2, 2]
  int64_t wide;    // nf4, fp4: uint8 [Kp / 32, kRowTile]
  int64_t wide_rows;  // bfloat16 [Kp / 32, kWideRows, 32]; amx_bf16 only
  int64_t tile;    // where the rows lie that were rearranged: kTileNotes bytes
  int64_t strip;   // float [kFloatStrip, 16]
  int64_t bytes;   // all of it
};

inline int64_t take(int64_t& end, int64_t bytes) {
  const int64_t begin = end;
  end += ceil_div(bytes, 64) * 64;
  return begin;
}

inline ScratchLayout scratch_layout(const Weights& weights) {
  const int64_t blocks = activation_blocks(weights.in_features);
  ScratchLayout layout{};
  int64_t end = 0;
  if (has_codebook(weights.format)) {
    layout.absmax = take(end, scale_blocks(weights) * kPanelRows * 4);
  }
  layout.terms = take(end, blocks * kRowTile * 8);
  layout.scales = take(end, blocks * kRowTile * 8);
  const int64_t groups = activation_groups(weights.in_features);
  layout.group_scales = take(end, groups * kRowTile * 4);
  layout.magics = take(end, groups * kRowTile * kGroupBlocks * 4);
  layout.magic_steps = take(end, groups * kRowTile * kGroupBlocks * 4);
  layout.codes = take(end, blocks * kRowTile * kActivationBlock);
  if (has_codebook(weights.format)) {
    layout.starts = take(end, blocks * kRowTile * 8);
    layout.wide = take(end, blocks * kRowTile);
  }
  layout.wide_rows = take(end, blocks * kWideRows * kActivationBlock * 2);
  layout.tile = take(end, kTileNotes);
  layout.strip = take(end, kFloatStrip * kPanelRows * 4);
  layout.bytes = end;
  return layout;
}

}  // namespace
}  // namespace edgelora::kernels
