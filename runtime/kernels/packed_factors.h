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

inline int32_t packed_start(const PackedT& t, int64_t row) {
  int32_t start;
  std::memcpy(&start, t.data + row * t.stride + 1, sizeof start);
  return start;
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

// Panels of b that meet rows of t together.
struct PackedPanels {
  const uint8_t* at(int64_t p) const { return first + p * packed_panel_bytes(quads); }
  const uint8_t* codes(int64_t p) const { return at(p) + kPackedScaleBytes; }

  const uint8_t* first;
  int64_t quads;    // ⌈rank/4⌉
  int64_t columns;  // of y, of each: 16, or fewer of a last panel, which is alone
};

// Isa::add_rows for the number of rows, a constant of the code.
template <class Isa, int kRows, int kPanels>
void add_packed_rows(const PackedPanels& b, const PackedT& t, float* y, int64_t y_stride) {
  if constexpr (kRows > 1) {
    if (t.rows < kRows) return add_packed_rows<Isa, kRows - 1, kPanels>(b, t, y, y_stride);
  }
  Isa::template add_rows<kRows, kPanels>(b, t, y, y_stride);
}

template <class Isa, int kPanels>
void add_packed_panels(const PackedPanels& b, PackedT t, float* y, int64_t y_stride) {
  int64_t left = t.rows;
  for (int64_t groups = ceil_div(left, Isa::kMostRows); groups > 0; --groups) {
    t.rows = left / groups;
    add_packed_rows<Isa, Isa::kMostRows, kPanels>(b, t, y, y_stride);
    t.data += t.rows * t.stride;
    y += t.rows * y_stride;
    left -= t.rows;
  }
}

// Panels of b in turn meet all rows of t, Isa::kPanels of them where there are several rows, up to
// Isa::kMostRows of these at a time:
//   Isa::add_rows<kRows, kPanels>(b, t, y, y_stride)   y [kRows, columns of the panels] += b·t
template <class Isa>
void drive_packed_factors(const PackedFactors& factors, int64_t out_features, const PackedT& t,
                          int64_t panel_begin, int64_t panel_end, float* y, int64_t y_stride) {
  const int64_t quads = ceil_div(factors.rank, 4);
  for (int64_t p = panel_begin; p < panel_end;) {
    const int64_t columns = out_features - p * kPanelRows;
    const PackedPanels b{packed_panel(factors, p), quads, min_of(kPanelRows, columns)};
    float* to = y + p * kPanelRows;
    fetch_ahead(b.first, quads);
    if (t.rows > 1 && p + Isa::kPanels <= panel_end && columns >= Isa::kPanels * kPanelRows) {
      for (int i = 1; i < Isa::kPanels; ++i) fetch_ahead(b.at(i), quads);
      add_packed_panels<Isa, Isa::kPanels>(b, t, to, y_stride);
      p += Isa::kPanels;
    } else {
      add_packed_panels<Isa, 1>(b, t, to, y_stride);
      ++p;
    }
  }
}

}  // namespace
}  // namespace edgelora::kernels
