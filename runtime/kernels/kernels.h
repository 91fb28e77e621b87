// The contract of every kernel: arithmetic on panels, one table of functions for each ISA.
//
// No ORT, no exceptions, no allocation, no threads. Callers check every size; kernels only assert.
// Layouts are drawn in ARCHITECTURE.md ("Weights: formats").
#pragma once

#include <cstdint>

namespace edgelora::kernels {

inline constexpr int kPanelRows = 16;        // rows of N that a panel interleaves
inline constexpr int kActivationBlock = 32;  // consecutive K values that share an activation scale
inline constexpr int kGroupBlocks = 4;       // such blocks that are a group

enum class Format : uint8_t { kFloat, kInt4, kInt4ZeroPoints, kInt4Offsets, kInt8, kNf4, kFp4 };

// Codes that stand for the values of a codebook, times absmax.
constexpr bool has_codebook(Format format) {
  return format == Format::kNf4 || format == Format::kFp4;
}

// What an nf4 or fp4 weight is rounded to after its product: what bitsandbytes' quant_state says.
enum class Rounding { kNone, kBfloat16, kFloat16 };

// One packed linear; every pointer into memory owned by somebody else, none needs alignment beyond
// 2 bytes.
struct Weights {
  Format format;
  int64_t in_features;     // K
  int64_t out_features;    // N
  int64_t block_size;      // 32, 64 or 128 (nf4, fp4: 64)
  const void* codes;       // kFloat: float32 weights
  // Where panels have room for more K than in_features (a cache that grows along K): bytes of codes
  // and blocks of scales, zero points or offsets from one panel to the next. 0: tightly packed.
  int64_t panel_stride;
  int64_t block_stride;
  // float16 [P, blocks, 16]; null for kFloat. kNf4, kFp4: what `unpack_absmax` wrote, for `linear`
  // alone.
  const uint16_t* scales;
  // kInt4ZeroPoints: uint8 [P, blocks, 8]; kInt4Offsets: float16 [P, blocks, 16]; else null
  const void* zero_points;
  // kInt4Offsets: float32 [P, blocks, 16], what linear_float and dequantize_row add in the place of
  // zero_points, which are rounded from them; or null.
  const float* exact_offsets;
  // nf4 and fp4 only
  const uint8_t* absmax;       // codes, slices padded to multiples of 256; null: not quantized
  const float* nested_absmax;  // one for 256 absmax codes; without codes absmax itself, padded so
  const float* absmax_offset;  // [slices]
  const float* absmax_table;   // [256]
  Rounding rounding;           // of each weight, in linear_float and dequantize_row
  float scale_unit;            // a power of two, of which `scales` are multiples
  // [slice_count] out_features of each slice; blocks of absmax are counted in each anew
  const int64_t* slices;
  int64_t slice_count;
};

// Rows of activations, quantized to int8 in blocks of 32: x ≈ scales · codes, codes in −127…127.
struct Activations {
  int64_t rows;         // M
  const int8_t* codes;  // [M, Kp], padding is zero
  const float* scales;  // [M, Kp/32]; 0 for an all-zero block
  const int32_t* sums;  // [M, Kp/32], sum of the block's codes
  // The scratch is as the call before left it, for these rows and weights of the same format,
  // block_size and in_features: what it holds rearranged of the rows need not be made anew.
  bool kept = false;
  bool grouped = false;  // by quantize_groups
};

// One side branch factor pair of one slice. Exactly one dtype for both.
struct Factors {
  bool half;  // float16, else float32; unaligned
  int64_t rank;
  const void* a;  // [rank, K]
  const void* b;  // [panels of the slice, rank, 16]
};

// A factor pair rounded to int8: half the bytes that a decoded token streams.
struct PackedFactors {
  int64_t rank;           // 1…kMostPackedRank
  Weights a;              // kInt8 [rank, K], block_size 32
  // For each panel 32 + 64·⌈rank/4⌉ bytes: the scales of its rows, float16 [16]; int8
  // [⌈rank/4⌉, 16, 4], column 4q + j of row i at [q, i, j], a surplus column 0. No code is −128.
  const uint8_t* b;
};

// A·x of some rows of x: of each a float32 scale, −128·Σ codes as int32 (where sums of unsigned
// b + 128 start), and behind them the codes, int8 [4·⌈rank/4⌉], a surplus one 0, none −128.
struct PackedT {
  int64_t rows;
  const float* data;  // row m at data + m · stride
  int64_t stride;     // floats

  static constexpr int64_t kBesideCodes = 2;  // floats: the scale and the start
};

inline constexpr int64_t kMostPackedRank = 512;  // beyond it float16 factors; int32 would hold more

// The functions of one ISA.
struct KernelTable {
  const char* isa;     // "scalar", "avx2", "avx512_vnni"…
  int64_t strip_rows;  // of x: what linear rearranges of W it rearranges once for so many

  // x [K] → codes [Kp], scales [Kp/32], sums [Kp/32]. amax/127, round half to even.
  void (*quantize_activations)(const float* x, int64_t in_features, int8_t* codes, float* scales,
                               int32_t* sums);

  // The same, but the scales of four blocks are powers of two apart, 2^5 at most: each up to twice
  // amax/127, or 1/32 of the largest.
  // Null where `linear` is no faster with them.
  void (*quantize_groups)(const float* x, int64_t in_features, int8_t* codes, float* scales,
                          int32_t* sums);

  // y[m, 16p … 16p+15] = W·x for panels [panel_begin, panel_end); overwrites; y has row stride
  // y_stride (floats); rows of N beyond out_features are not written. scratch:
  // linear_scratch_bytes(weights) bytes of this thread, 64-byte aligned.
  void (*linear)(const Weights& weights, const Activations& x, int64_t panel_begin,
                 int64_t panel_end, float* y, int64_t y_stride, void* scratch);

  // kNf4, kFp4: the scales of one panel for this ISA's `linear`, from absmax and scale_unit:
  // float16 [absmax_panel_scales(weights)]. scratch as for `linear`.
  void (*unpack_absmax)(const Weights& weights, int64_t panel, uint16_t* scales, void* scratch);

  // The exact path: float32 activations [M, K] (row stride K), weights dequantized exactly as
  // edgelora/quantize does. Also kFloat.
  void (*linear_float)(const Weights& weights, const float* x, int64_t rows, int64_t panel_begin,
                       int64_t panel_end, float* y, int64_t y_stride, void* scratch);

  // t[r] = weight · Σ_k a[r, k] · x[k], r in 0…rank−1. weight = adapter weight · scaling.
  void (*side_branch_down)(const Factors& factors, int64_t in_features, float weight,
                           const float* x, float* t);

  // y[16p + i] += Σ_r b[p, r, i] · t[r] for panels [panel_begin, panel_end) *of the slice*; y
  // points to the slice's first row; rows ≥ out_features of the slice are not touched.
  void (*side_branch_up)(const Factors& factors, int64_t out_features, const float* t,
                         int64_t panel_begin, int64_t panel_end, float* y);

  // As side_branch_up, of int8 b and t and several rows: y[m, 16p + i] += t_scale[m] ·
  // b_scale[16p + i] · Σ_r b[p, r, i] · t[m, r], the sum an exact integer. y has row stride
  // y_stride (floats).
  void (*side_branch_up_int8)(const PackedFactors& factors, int64_t out_features,
                              const PackedT& t, int64_t panel_begin, int64_t panel_end, float* y,
                              int64_t y_stride);

  // One row of W as float32 [K] (embedding lookup).
  void (*dequantize_row)(const Weights& weights, int64_t row, float* out);

  // out[i] = silu(gate[i]) · up[i]
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);

  // out[i] = x[i] · weight[i] / √(Σ x² / n + epsilon); out may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float epsilon, float* out);

  // The largest x; NaN are passed over. −Inf for none.
  float (*largest)(const float* x, int64_t n);

  // x[i] = e^(x[i] − most), most ≥ every x; returns their sum.
  float (*exp_minus)(float* x, int64_t n, float most);

  // Rotary embedding of one head: x and out [2·half], which may be one; cos and sin [half] of its
  // position.
  void (*rotate)(const float* x, const float* cos, const float* sin, int64_t half, float* out);
};

// Whether x is rounded in groups where it meets weights of this format. Not beside nf4 and fp4,
// whose bytes are rounded already.
inline bool groups_scales(const KernelTable& kernels, Format format) {
  return kernels.quantize_groups != nullptr && !has_codebook(format);
}

// Bytes of scratch that `linear` and `linear_float` want for these weights.
int64_t linear_scratch_bytes(const Weights& weights);

// kNf4, kFp4: values of a panel's scales, and the unit of which float16 holds them all.
int64_t absmax_panel_scales(const Weights& weights);
float absmax_scale_unit(const Weights& weights);

// CPU features as a mask; `detect_features` reads this machine.
using Features = uint64_t;
Features detect_features();

// The best table for the features; `forced` (may be null) names an ISA. Null if the name is unknown
// or the features lack it. Pure: the same arguments give the same table.
const KernelTable* select_kernels(Features features, const char* forced);

// Name of ISA i (0, 1, … best first), or null past the end; and whether these features can run it.
const char* isa_name(int index);
bool isa_supported(int index, Features features);

}  // namespace edgelora::kernels
