// Codes of a panel as bytes in registers, for `linear` of all NEON folders.
//
// 16 rows × 8 K of nibbles, 64 bytes, four registers g of four rows:
//     │ r0: K0 K1 K2 K3 │ r1: K0 … │ r2 │ r3 │     low nibbles; the high nibbles are K4 … K7
// int8 has K0 … K3 of 16 rows in one line of 64 bytes and K4 … K7 in the next.
#pragma once

#include "kernels/neon/registers.h"
#include "kernels/codebooks.h"
#include "kernels/panels.h"

namespace edgelora::kernels {
namespace {

constexpr int64_t kInt4BlockBytes = 256;  // codes of 16 rows × 32 K
constexpr int64_t kInt8BlockBytes = 512;

struct Codes {          // of four rows
  int8x16_t low, high;  // K0 … K3, K4 … K7
};

struct Unpacking {
  uint8x16_t nibble;
  int8x16_t codebook;
};

template <Format kFormat>
EDGELORA_INLINE Unpacking unpacking() {
  return {vdupq_n_u8(15), vld1q_s8(codebook(kFormat).bytes)};
}

// q: which 8 K of the block; g: which four rows. int4: 0 … 15, nf4, fp4: the codebook's bytes.
template <Format kFormat>
EDGELORA_INLINE Codes load_codes(const uint8_t* block, int q, int g,
                                 Unpacking by = unpacking<kFormat>()) {
  if constexpr (kFormat == Format::kInt8) {
    const uint8_t* from = block + 128 * q + 16 * g;
    return {vreinterpretq_s8_u8(load_bytes(from)), vreinterpretq_s8_u8(load_bytes(from + 64))};
  }
  const uint8x16_t bytes = load_bytes(block + 64 * q + 16 * g);
  const uint8x16_t low = vandq_u8(bytes, by.nibble), high = vshrq_n_u8(bytes, 4);
  if constexpr (has_codebook(kFormat)) {
    return {vqtbl1q_s8(by.codebook, low), vqtbl1q_s8(by.codebook, high)};
  }
  return {vreinterpretq_s8_u8(low), vreinterpretq_s8_u8(high)};
}

template <Format kFormat>
const uint8_t* block_codes(const uint8_t* panel_codes, int64_t b) {
  return panel_codes + b * (kFormat == Format::kInt8 ? kInt8BlockBytes : kInt4BlockBytes);
}

}  // namespace
}  // namespace edgelora::kernels
