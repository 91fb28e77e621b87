// What `linear` of all NEON folders does with a block's dots:
//
//   acc = acc [+ offset · xscale·Σx] + float(dot) · scale · xscale
//   of the last three factors two are multiplied, and rounded, before the addition: the same two
//   for one row and for groups of four, so that the number of rows changes no bit of y
//   int4, zero points: dot = Σ code·x − zp·Σx where codes go straight from the panel into the sums,
//   which start at −zp·Σx; Σ (code − zp)·x where a block is unpacked for many rows
#pragma once

#include "kernels/linear_driver.h"
#include "kernels/neon/codes.h"

namespace edgelora::kernels {
namespace {

struct Scales {  // of 16 rows for one scale block
  float32x4_t scale[4];
  float32x4_t offset[4];     // kInt4Offsets
  int32x4_t zero_points[4];  // kInt4ZeroPoints
};

inline void load_zero_points(const uint8_t* from, int32x4_t out[4]) {
  const uint8x8_t packed = vld1_u8(from);
  const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vand_u8(packed, vdup_n_u8(15))));
  const int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vshr_n_u8(packed, 4)));
  out[0] = vmovl_s16(vget_low_s16(low));
  out[1] = vmovl_high_s16(low);
  out[2] = vmovl_s16(vget_low_s16(high));
  out[3] = vmovl_high_s16(high);
}

template <Format kFormat>
EDGELORA_INLINE Scales load_scales(const PanelView& panel, int64_t b) {
  const int64_t i = b >> panel.shift;
  Scales s;
  load_half16(panel.scales + i * 16, s.scale);
  if constexpr (kFormat == Format::kInt4Offsets) load_half16(panel.offsets + i * 16, s.offset);
  if constexpr (kFormat == Format::kInt4ZeroPoints) {
    load_zero_points(panel.zero_points + i * 8, s.zero_points);
  }
  return s;
}

inline int32_t neon_term_zero(Format format) {
  if (has_codebook(format)) return -codebook(format).byte_zero;
  return format == Format::kInt4 ? -8 * 32 : format == Format::kInt4ZeroPoints ? -32 : 0;
}

// A sum that starts at these bits is, read as a float, 1.5·2^23 + sum for every |sum| < 2^22: one
// subtraction makes it a float, exactly. Neoverse N1's and N2's scvtf takes four times as long.
constexpr int32_t kFloatBits = 0x4b400000;

EDGELORA_INLINE float32x4_t float_of_biased(int32x4_t sum) {
  return vsubq_f32(vreinterpretq_f32_s32(sum), vdupq_n_f32(0x1.8p23f));
}

// Where the sums of rows 4g … 4g+3 start, above `bias`; i is [block, row] in the tile's small
// arrays. kSource: what the products are made of, a format's codes or, kInt8, bytes.
template <Format kFormat, Format kSource>
EDGELORA_INLINE int32x4_t first_sum(const Scales& s, int g, const RowTile& x, int64_t i,
                                    int32_t bias) {
  if constexpr (kSource == Format::kInt4 || has_codebook(kFormat)) {
    return vdupq_n_s32(x.terms[i] + bias);
  }
  if constexpr (kSource == Format::kInt4ZeroPoints) {
    return vmlaq_n_s32(vdupq_n_s32(bias), s.zero_points[g], x.terms[i]);
  }
  return vdupq_n_s32(bias);
}

// Four bytes of each row's zero point, rows 4g … 4g+3.
template <Format kFormat>
EDGELORA_INLINE int8x16_t zero_point_bytes(const Scales& s, int g) {
  if constexpr (kFormat == Format::kInt4) return vdupq_n_s8(8);
  if constexpr (kFormat == Format::kInt4ZeroPoints) {
    return vreinterpretq_s8_s32(vmulq_n_s32(s.zero_points[g], 0x01010101));
  }
  return vdupq_n_s8(0);
}

// Codes less their zero points: the bytes that `linear` multiplies x with.
template <Format kFormat>
EDGELORA_INLINE Codes load_bytes_of(const uint8_t* block, const Scales& s, int q, int g) {
  const Codes w = load_codes<kFormat>(block, q, g);
  const int8x16_t zero_point = zero_point_bytes<kFormat>(s, g);
  return {vsubq_s8(w.low, zero_point), vsubq_s8(w.high, zero_point)};
}

// What is rounded before it is added: scale · xscale, which need not wait for the dots, or
// float(dot) · xscale, which takes fewer registers.
enum class Rounded { kScales, kDots };

// What one row of x brings to a block, read before anything is stored.
struct XScale {
  float scale;
  float shift;  // kInt4Offsets
};

template <Format kFormat>
EDGELORA_INLINE XScale x_scale(const RowTile& x, int64_t i) {
  return {x.scales[i], kFormat == Format::kInt4Offsets ? x.shifts[i] : 0.0f};
}

// acc[g] += (dots[g] · x_scale) · scales[g]. As assembly because compilers put each product before
// its sum, where a core that does not reorder waits for it four times.
EDGELORA_INLINE void add_scaled(const float32x4_t dots[4], float x_scale,
                                const float32x4_t scales[4], float32x4_t acc[4]) {
  float32x4_t p0 = dots[0], p1 = dots[1], p2 = dots[2], p3 = dots[3];
  asm("fmul %[p0].4s, %[p0].4s, %[x].s[0]\n"
      "fmul %[p1].4s, %[p1].4s, %[x].s[0]\n"
      "fmul %[p2].4s, %[p2].4s, %[x].s[0]\n"
      "fmul %[p3].4s, %[p3].4s, %[x].s[0]\n"
      "fmla %[acc0].4s, %[p0].4s, %[s0].4s\n"
      "fmla %[acc1].4s, %[p1].4s, %[s1].4s\n"
      "fmla %[acc2].4s, %[p2].4s, %[s2].4s\n"
      "fmla %[acc3].4s, %[p3].4s, %[s3].4s\n"
      : [acc0] "+w"(acc[0]), [acc1] "+w"(acc[1]), [acc2] "+w"(acc[2]), [acc3] "+w"(acc[3]),
        [p0] "+&w"(p0), [p1] "+&w"(p1), [p2] "+&w"(p2), [p3] "+&w"(p3)
      : [x] "w"(x_scale), [s0] "w"(scales[0]), [s1] "w"(scales[1]), [s2] "w"(scales[2]),
        [s3] "w"(scales[3]));
}

// acc [16] + one block. Step by step for all four registers: one after the other, each would wait
// for its own results on a core that does not reorder.
template <Format kFormat, Rounded kRounded = Rounded::kScales>
EDGELORA_INLINE void add_block(const float32x4_t dots[4], const Scales& s, const XScale& x,
                               float32x4_t acc[4]) {
  float32x4_t scales[4];
  if constexpr (kRounded == Rounded::kScales) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) scales[g] = vmulq_n_f32(s.scale[g], x.scale);
  }
  if constexpr (kFormat == Format::kInt4Offsets) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) acc[g] = vfmaq_n_f32(acc[g], s.offset[g], x.shift);
  }
  if constexpr (kRounded == Rounded::kDots) return add_scaled(dots, x.scale, s.scale, acc);
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) acc[g] = vfmaq_f32(acc[g], dots[g], scales[g]);
}

}  // namespace
}  // namespace edgelora::kernels
