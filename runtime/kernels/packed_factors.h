// How PackedFactors and PackedT lie: drawn in kernels.h.
#pragma once

#include "kernels/half.h"
#include "kernels/panels.h"

namespace edgelora::kernels {
namespace {

constexpr int64_t kPackedScaleBytes = 2 * kPanelRows;  // bytes before the codes of a panel of b

inline int64_t packed_panel_bytes(int64_t quads) { return kPackedScaleBytes + 64 * quads; }

// A panel of b: its 16 scales, then its codes.
inline const uint8_t* packed_panel(const PackedFactors& factors, int64_t panel) {
  return factors.b + panel * packed_panel_bytes(ceil_div(factors.rank, 4));
}

inline float packed_scale(const PackedT& t, int64_t row) { return t.data[row * t.stride]; }

inline int32_t packed_sum(const PackedT& t, int64_t row) {
  int32_t sum;
  std::memcpy(&sum, t.data + row * t.stride + 1, sizeof sum);
  return sum;
}

inline const int8_t* packed_codes(const PackedT& t, int64_t row) {
  return reinterpret_cast<const int8_t*>(t.data + row * t.stride + PackedT::kBesideCodes);
}

// b is wanted so many bytes before it is read: caches stop at the end of a page.
constexpr int64_t kFetchAhead = 4096;

inline void fetch_ahead(const uint8_t* panel, int64_t quads) {
  for (int64_t i = 0; i < packed_panel_bytes(quads); i += 64) {
    __builtin_prefetch(panel + kFetchAhead + i);
  }
}

// Each panel of b in turn meets all rows of t, up to Isa::kMostRows of them at a time:
//   Isa::add_rows<kRows>(panel, quads, t, m, columns, y, y_stride)   y of rows m … m + kRows − 1 +=
//                                                                    b·t
template <class Isa>
void drive_packed_factors(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                          int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride) {
  const int64_t quads = ceil_div(factors.rank, 4);
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const uint8_t* panel = packed_panel(factors, p);
    fetch_ahead(panel, quads);
    const int64_t columns = min_of(kPanelRows, out_features - p * kPanelRows);
    float* to = y + p * kPanelRows;
    int64_t m = 0;
    for (; m + Isa::kMostRows <= t.rows; m += Isa::kMostRows) {
      Isa::template add_rows<Isa::kMostRows>(panel, quads, t, m, columns, to, y_stride);
    }
    for (; m < t.rows; ++m) {
      Isa::template add_rows<1>(panel, quads, t, m, columns, to, y_stride);
    }
  }
}

}  // namespace
}  // namespace edgelora::kernels
