// y[m, n] = Σ_b xscale[m, b] · (scale[n, b] · dot_b [+ offset[n, b] · sum_b]),  b: blocks of 32 of
// K
//
// One row of x, or two: neon_dotprod/sdot.h. Several: groups of four (neon/four_rows.h). sdot adds
// four signed byte products to each lane; its second operand is one lane of a register. W is that
// one: its register, 4 K of four rows (neon/codes.h draws it), meets 4 K of four rows of x
//     x  │ m: K0 … K3 │ m+1 │ m+2 │ m+3 │
// in four sums, one for each row of W, each of the four rows of x.
#include "kernels/neon/four_rows.h"
#include "kernels/neon_dotprod/neon_dotprod.h"
#include "kernels/neon_dotprod/sdot.h"

namespace edgelora::kernels::neon_dotprod {
namespace {

// 4 K of four rows of W times those of x; what is `next` of x is loaded meanwhile. No sum waits for
// the one before on a core that does not reorder.
// clang-format off
#define EDGELORA_FOUR_K(x, w, next)               \
  "sdot %[s0].4s, %[" x "].16b, %[" w "].4b[0]\n" \
  "ldr %q" next "\n"                              \
  "sdot %[s1].4s, %[" x "].16b, %[" w "].4b[1]\n" \
  "sdot %[s2].4s, %[" x "].16b, %[" w "].4b[2]\n" \
  "sdot %[s3].4s, %[" x "].16b, %[" w "].4b[3]\n"
// clang-format on

struct Isa : FewOrGroupedRows<Isa, Sdot> {
  static constexpr Rounded kRounded = Rounded::kScales;
  static constexpr int kValues = 4;  // one for each row of x

  // 16 K of four rows at a time: │ m: K0 … K3 │ m+1 │ m+2 │ m+3 │ m: K4 … K7 │ …
  static void interleave(const int8_t* const from[4], int64_t k, int8_t* to) {
    for (int half = 0; half < 2; ++half) {
      int32x4x4_t rows;
      for (int r = 0; r < 4; ++r) {
        rows.val[r] = vreinterpretq_s32_s8(vld1q_s8(from[r] + k + 16 * half));
      }
      vst4q_s32(reinterpret_cast<int32_t*>(to + 64 * half), rows);
    }
  }

  static void store_values(float32x4_t of_rows, float* to) { vst1q_f32(to, of_rows); }

  using Bias = float32x4_t;  // what float_of_biased takes away
  static Bias bias() {
    Bias bias = vdupq_n_f32(kBias);
    asm volatile("" : "+w"(bias));  // stays in its register
    return bias;
  }

  using Scale = float32x4_t;
  static EDGELORA_INLINE void arrange(int8x16_t[8]) {}
  static EDGELORA_INLINE Scale widen(float32x4_t scale) { return scale; }

  // acc[n], of row n of W: += float(dot) · (xscale · scale[n]). As assembly because compilers put
  // sums next to each other that wait for each other, or run out of registers.
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
        "ldr %q[s2], [%[starts], #(%c[start])]\n"
        "ldr %q[s3], [%[starts], #(%c[start])]\n"
        EDGELORA_FOUR_K("a", "w0", "[b], [%[x], #(%c[at] + 16)]")
        EDGELORA_FOUR_K("b", "w1", "[a], [%[x], #(%c[at] + 32)]")
        EDGELORA_FOUR_K("a", "w2", "[b], [%[x], #(%c[at] + 48)]")
        EDGELORA_FOUR_K("b", "w3", "[a], [%[x], #(%c[at] + 64)]")
        EDGELORA_FOUR_K("a", "w4", "[b], [%[x], #(%c[at] + 80)]")
        EDGELORA_FOUR_K("b", "w5", "[a], [%[x], #(%c[at] + 96)]")
        EDGELORA_FOUR_K("a", "w6", "[b], [%[x], #(%c[at] + 112)]")
        EDGELORA_FOUR_K("b", "w7", "[a], [%[x_scales], #(%c[at] / 8)]")
        "fmul %[b].4s, %[a].4s, %[scale].s[0]\n"
        "fsub %[s0].4s, %[s0].4s, %[bias].4s\n"
        "fsub %[s1].4s, %[s1].4s, %[bias].4s\n"
        "fsub %[s2].4s, %[s2].4s, %[bias].4s\n"
        "fsub %[s3].4s, %[s3].4s, %[bias].4s\n"
        "fmla %[acc0].4s, %[s0].4s, %[b].4s\n"
        "fmul %[b].4s, %[a].4s, %[scale].s[1]\n"
        "fmul %[s0].4s, %[a].4s, %[scale].s[2]\n"
        "fmul %[a].4s, %[a].4s, %[scale].s[3]\n"
        "fmla %[acc1].4s, %[s1].4s, %[b].4s\n"
        "fmla %[acc2].4s, %[s2].4s, %[s0].4s\n"
        "fmla %[acc3].4s, %[s3].4s, %[a].4s\n"
        : [acc0] "+w"(acc[0]), [acc1] "+w"(acc[1]), [acc2] "+w"(acc[2]), [acc3] "+w"(acc[3]),
          [s0] "=&w"(s0), [s1] "=&w"(s1), [s2] "=&w"(s2), [s3] "=&w"(s3), [a] "=&w"(a),
          [b] "=&w"(b)
        : [w0] "w"(w[0]), [w1] "w"(w[1]), [w2] "w"(w[2]), [w3] "w"(w[3]), [w4] "w"(w[4]),
          [w5] "w"(w[5]), [w6] "w"(w[6]), [w7] "w"(w[7]), [bias] "w"(bias), [scale] "w"(scale),
          [x] "r"(x), [starts] "r"(starts), [x_scales] "r"(x_scales),
          [at] "i"(kGroup * kGroupBytes), [start] "i"(kStart * kValues * 4)
        : "memory");
    // clang-format on
  }

  // acc[n] += offset[n] · shift of each row of x
  static EDGELORA_INLINE void add_products(float32x4_t offset, const float* shifts,
                                           float32x4_t acc[4]) {
    const float32x4_t shift = vld1q_f32(shifts);
    acc[0] = vfmaq_laneq_f32(acc[0], shift, offset, 0);
    acc[1] = vfmaq_laneq_f32(acc[1], shift, offset, 1);
    acc[2] = vfmaq_laneq_f32(acc[2], shift, offset, 2);
    acc[3] = vfmaq_laneq_f32(acc[3], shift, offset, 3);
  }

  // acc [16 rows of W][4 of x] → [4][16]
  static void in_rows(float* acc) {
    float32x4x4_t columns[4];
    for (int g = 0; g < 4; ++g) columns[g] = vld4q_f32(acc + 16 * g);
    for (int g = 0; g < 4; ++g) {
      for (int r = 0; r < 4; ++r) vst1q_f32(acc + r * kPanelRows + 4 * g, columns[g].val[r]);
    }
  }
};

}  // namespace

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch) {
  drive_groups<Isa>(weights, x, panel_begin, panel_end, y, y_stride, scratch);
}

}  // namespace edgelora::kernels::neon_dotprod
