// What panel_pairs.h starts its sums from, and adds to them before each further block.
//
// Scales of x in a group are powers of two apart, 2^−e, e = 0…5 (elementwise.cc). A sum is a float
// whose bits vpdpbusd takes for an integer: magic(e) = 1.5·2^(23 − e), whose lowest bit is worth
// 2^−e, plus what the blocks so far give. Before the next block one addition makes it that of the
// block's own e', with the codes' zero, 8, already taken away:
//     step = magic(e') − magic(e) − 8·Σx·2^−e'
// and at the end magic(e) is taken away. No bit is lost above, since |Σ dot·2^(e' − e)| < 2^22 for
// four blocks and five halvings; below, where e changes, two roundings to the coarser of both units
// (the step's own and that of adding it), half a unit each.
#pragma once

#include <immintrin.h>

#include "kernels/avx2/registers.h"
#include "kernels/linear_driver.h"

namespace edgelora::kernels::avx512_vnni {
namespace {

constexpr int32_t kMagicBits = 0x4b400000;  // of 1.5·2^23
constexpr int32_t kOneBits = 0x3f800000;

// Lanes of the first of `step` blocks that share a scale of W: one, two or four.
inline __m128i first_blocks(int64_t step) {
  return _mm_setr_epi32(-1, step == 1 ? -1 : 0, step < 4 ? -1 : 0, step == 1 ? -1 : 0);
}

inline __m128i lanes_below(int64_t count) {
  return _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int32_t>(count)), _mm_setr_epi32(0, 1, 2, 3));
}

// The four blocks of a group.
struct MagicSteps {
  __m128i most;    // float, in each lane: the group's scale
  __m128i magics;  // float
  __m128i steps;   // int32 where a sum starts, else float
};

inline MagicSteps magic_steps(__m128i scales, __m128i sums, __m128i first) {
  const __m128i most = largest_lane(scales);  // NaN above all
  const __m128i none = _mm_cmpeq_epi32(scales, _mm_setzero_si128());
  const __m128i exponents = _mm_andnot_si128(none, _mm_sub_epi32(scales, most));  // −e << 23
  const __m128i magics = _mm_add_epi32(_mm_set1_epi32(kMagicBits), exponents);
  const __m128i before = _mm_shuffle_epi32(magics, 0x90);  // lanes 0 0 1 2
  const __m128i zeros = _mm_slli_epi32(sums, 3);
  const __m128 units = _mm_castsi128_ps(_mm_add_epi32(_mm_set1_epi32(kOneBits), exponents));
  const __m128 changes = _mm_sub_ps(_mm_castsi128_ps(magics), _mm_castsi128_ps(before));
  const __m128 steps = _mm_sub_ps(changes, _mm_mul_ps(_mm_cvtepi32_ps(zeros), units));
  return {most, magics,
          _mm_blendv_epi8(_mm_castps_si128(steps), _mm_sub_epi32(magics, zeros), first)};
}

// Of the rows of a tile; block_size: of W.
inline void pack_magic_steps(const Activations& x, int64_t block_size, int64_t first_row,
                             RowTile* tile, void* scratch, const ScratchLayout& layout) {
  const __m128i first = first_blocks(block_size / kActivationBlock);
  auto* scales = reinterpret_cast<float*>(at(scratch, layout.group_scales));
  auto* magics = reinterpret_cast<float*>(at(scratch, layout.magics));
  auto* steps = reinterpret_cast<float*>(at(scratch, layout.magic_steps));
  for (int64_t m = 0; m < tile->rows; ++m) {
    const int64_t row = (first_row + m) * tile->blocks;
    for (int64_t b = 0, to = m; b < tile->blocks; b += kGroupBlocks, to += tile->rows) {
      const __m128i there = lanes_below(tile->blocks - b);
      const MagicSteps group =
          magic_steps(_mm_castps_si128(_mm_maskload_ps(x.scales + row + b, there)),
                      _mm_maskload_epi32(x.sums + row + b, there), first);
      _mm_store_ss(scales + to, _mm_castsi128_ps(group.most));
      _mm_store_ps(magics + kGroupBlocks * to, _mm_castsi128_ps(group.magics));
      _mm_store_ps(steps + kGroupBlocks * to, _mm_castsi128_ps(group.steps));
    }
  }
  tile->group_scales = scales;
  tile->magics = magics;
  tile->magic_steps = steps;
}

}  // namespace
}  // namespace edgelora::kernels::avx512_vnni
