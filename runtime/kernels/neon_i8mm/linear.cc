// y[m, n] = Σ_b xscale[m, b] · (scale[n, b] · dot_b [+ offset[n, b] · sum_b]),  b: blocks of 32 of
// K
//
// One row of x, or two: neon_dotprod/sdot.h. Several: groups of four (neon/four_rows.h) in two
// pairs: smmla multiplies 2 rows of x × 8 K with 8 K × 2 rows of W into four int32:
//     x  │ m: K0 … K7 │ m+1: K0 … K7 │        w  │ r: K0 … K7 │ r+1: K0 … K7 │
//     sum  │ m·r │ m·(r+1) │ (m+1)·r │ (m+1)·(r+1) │
// A register of W's nibbles (neon/codes.h) has K0 … K3 of four rows low and K4 … K7 high: zip1 and
// zip2 of the two make the registers of rows r, r+1 and r+2, r+3.
#include "kernels/neon/four_rows.h"
#include "kernels/neon_dotprod/sdot.h"
#include "kernels/neon_i8mm/neon_i8mm.h"

namespace edgelora::kernels::neon_i8mm {
namespace {

// 8 K of four rows of W, two registers, times those of x, a and b; what is next is loaded
// meanwhile.
// clang-format off
#define EDGELORA_EIGHT_K(first, last, next_a, next_b)      \
  "smmla %[s0].4s, %[a].16b, %[" first "].16b\n"           \
  "smmla %[s1].4s, %[a].16b, %[" last "].16b\n"            \
  "ldr %q[a], " next_a "\n"                                \
  "smmla %[s2].4s, %[b].16b, %[" first "].16b\n"           \
  "smmla %[s3].4s, %[b].16b, %[" last "].16b\n"            \
  "ldr %q[b], " next_b "\n"
// clang-format on

// Each of four rows' values twice: for the two rows of x that meet rows r, r+1 and r+2, r+3.
struct PairScale {
  float32x4_t first, last;
};

struct Isa : FewOrGroupedRows<Isa, Sdot> {
  static constexpr Rounded kRounded = Rounded::kDots;  // no register is left for more products
  static constexpr int kValues = 8;  // two of each row of x, as they lie in the sums

  // [8 K of four][pairs of rows]: │ m: K0 … K7 │ m+1: K0 … K7 │
  static void interleave(const int8_t* const from[4], int64_t k, int8_t* to) {
    for (int p = 0; p < 2; ++p) {
      for (int half = 0; half < 2; ++half) {
        const int8_t *first = from[2 * p] + k + 16 * half, *last = from[2 * p + 1] + k + 16 * half;
        const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(first));
        const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(last));
        int8_t* out = to + half * 64 + p * 16;
        vst1q_s8(out, vreinterpretq_s8_s64(vzip1q_s64(a, b)));
        vst1q_s8(out + 32, vreinterpretq_s8_s64(vzip2q_s64(a, b)));
      }
    }
  }

  static void store_values(float32x4_t of_rows, float* to) {
    vst1q_f32(to, vzip1q_f32(of_rows, of_rows));
    vst1q_f32(to + 4, vzip2q_f32(of_rows, of_rows));
  }

  static EDGELORA_INLINE void arrange(int8x16_t w[8]) {
#pragma GCC unroll 4
    for (int q = 0; q < 8; q += 2) {
      const int32x4_t low = vreinterpretq_s32_s8(w[q]), high = vreinterpretq_s32_s8(w[q + 1]);
      w[q] = vreinterpretq_s8_s32(vzip1q_s32(low, high));
      w[q + 1] = vreinterpretq_s8_s32(vzip2q_s32(low, high));
    }
  }

  using Scale = PairScale;
  static EDGELORA_INLINE Scale widen(float32x4_t s) {
    const float64x2_t pairs = vreinterpretq_f64_f32(s);
    return {vreinterpretq_f32_f64(vdupq_laneq_f64(pairs, 0)),
            vreinterpretq_f32_f64(vdupq_laneq_f64(pairs, 1))};
  }

  using Bias = const float*;  // no register is left for it
  static Bias bias() { return kNoTerms; }

  // acc[2p + i], pair p of x and pair i of W: += float(dot) · xscale · scale. As assembly because
  // compilers put sums next to each other that wait for each other, or run out of registers.
  template <int kGroup, int kStart>
  static EDGELORA_INLINE void multiply(const int8x16_t w[8], const int8_t* x, const float* starts,
                                       const float* x_scales, Scale scale, Bias bias,
                                       float32x4_t acc[4]) {
    int8x16_t a, b;
    int32x4_t s0, s1, s2, s3;
    // clang-format off
    asm volatile(
        "ldr %q[a], [%[x], #(%c[at])]\n"
        "ldr %q[s0], [%[starts], #(%c[start])]\n"
        "ldr %q[s1], [%[starts], #(%c[start])]\n"
        "ldr %q[b], [%[x], #(%c[at] + 16)]\n"
        "ldr %q[s2], [%[starts], #(%c[start] + 16)]\n"
        "ldr %q[s3], [%[starts], #(%c[start] + 16)]\n"
        EDGELORA_EIGHT_K("w0", "w1", "[%[x], #(%c[at] + 32)]",
                         "[%[x], #(%c[at] + 48)]")
        EDGELORA_EIGHT_K("w2", "w3", "[%[x], #(%c[at] + 64)]",
                         "[%[x], #(%c[at] + 80)]")
        EDGELORA_EIGHT_K("w4", "w5", "[%[x], #(%c[at] + 96)]",
                         "[%[x], #(%c[at] + 112)]")
        EDGELORA_EIGHT_K("w6", "w7", "[%[bias]]",
                         "[%[x_scales], #(%c[at] / 4 + 16)]")
        "fsub %[s0].4s, %[s0].4s, %[a].4s\n"
        "fsub %[s1].4s, %[s1].4s, %[a].4s\n"
        "fsub %[s2].4s, %[s2].4s, %[a].4s\n"
        "fsub %[s3].4s, %[s3].4s, %[a].4s\n"
        "ldr %q[a], [%[x_scales], #(%c[at] / 4)]\n"
        "fmul %[s2].4s, %[s2].4s, %[b].4s\n"
        "fmul %[s3].4s, %[s3].4s, %[b].4s\n"
        "fmul %[s0].4s, %[s0].4s, %[a].4s\n"
        "fmul %[s1].4s, %[s1].4s, %[a].4s\n"
        "fmla %[acc2].4s, %[s2].4s, %[first].4s\n"
        "fmla %[acc3].4s, %[s3].4s, %[last].4s\n"
        "fmla %[acc0].4s, %[s0].4s, %[first].4s\n"
        "fmla %[acc1].4s, %[s1].4s, %[last].4s\n"
        : [acc0] "+w"(acc[0]), [acc1] "+w"(acc[1]), [acc2] "+w"(acc[2]), [acc3] "+w"(acc[3]),
          [s0] "=&w"(s0), [s1] "=&w"(s1), [s2] "=&w"(s2), [s3] "=&w"(s3), [a] "=&w"(a),
          [b] "=&w"(b)
        : [w0] "w"(w[0]), [w1] "w"(w[1]), [w2] "w"(w[2]), [w3] "w"(w[3]), [w4] "w"(w[4]),
          [w5] "w"(w[5]), [w6] "w"(w[6]), [w7] "w"(w[7]), [first] "w"(scale.first),
          [last] "w"(scale.last), [x] "r"(x), [starts] "r"(starts), [x_scales] "r"(x_scales),
          [bias] "r"(bias), [at] "i"(kGroup * kGroupBytes), [start] "i"(kStart * kValues * 4)
        : "memory");
    // clang-format on
  }

  // acc[2p + i] += offset of pair i · shift of pair p
  static EDGELORA_INLINE void add_products(Scale offset, const float* shifts, float32x4_t acc[4]) {
    const float32x4_t a = vld1q_f32(shifts), b = vld1q_f32(shifts + 4);
    acc[0] = vfmaq_f32(acc[0], offset.first, a);
    acc[1] = vfmaq_f32(acc[1], offset.last, a);
    acc[2] = vfmaq_f32(acc[2], offset.first, b);
    acc[3] = vfmaq_f32(acc[3], offset.last, b);
  }

  // acc [4 g][pairs of x][pairs of W][2][2] → [4][16]
  static void in_rows(float* acc) {
    float32x4_t sums[16];
    for (int i = 0; i < 16; ++i) sums[i] = vld1q_f32(acc + 4 * i);
    for (int g = 0; g < 4; ++g) {
      for (int p = 0; p < 2; ++p) {
        const float32x4_t first = sums[4 * g + 2 * p], last = sums[4 * g + 2 * p + 1];
        float* row = acc + 2 * p * kPanelRows + 4 * g;
        vst1q_f32(row, vcombine_f32(vget_low_f32(first), vget_low_f32(last)));
        vst1q_f32(row + kPanelRows, vcombine_f32(vget_high_f32(first), vget_high_f32(last)));
      }
    }
  }
};

}  // namespace

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch) {
  drive_groups<Isa>(weights, x, panel_begin, panel_end, y, y_stride, scratch);
}

}  // namespace edgelora::kernels::neon_i8mm
