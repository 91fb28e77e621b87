// The side branches of a LinearJob: t = weight · A·x, and y = row factors ⊙ y + B·t + bias.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "kernels/activation_block.h"
#include "kernels/ceil_div.h"
#include "ops/linear_job.h"

namespace edgelora::ops {
namespace {

using kernels::ceil_div;

constexpr int64_t kPanelRows = kernels::kPanelRows;
constexpr int64_t kBesideCodes = kernels::PackedT::kBesideCodes;

// The largest magnitude; Inf or NaN if any is: their bits, without the sign, are above every
// number's.
float most_of(const float* t, int64_t rank) {
  int32_t most = 0;
  for (int64_t r = 0; r < rank; ++r) {
    int32_t bits;
    std::memcpy(&bits, t + r, sizeof bits);
    most = std::max(most, bits & INT32_MAX);
  }
  float magnitude;
  std::memcpy(&magnitude, &most, sizeof magnitude);
  return magnitude;
}

template <int kCount>
void round_t(const float* t, float inverse, char* to) {
  int8_t codes[kCount];
  for (int i = 0; i < kCount; ++i) {
    codes[i] = static_cast<int8_t>(kernels::round_half_even(t[i] * inverse));
  }
  std::memcpy(to, codes, sizeof codes);
}

// t [rank] → int8 [4·⌈rank/4⌉] in its place; returns the scale, NaN if a t is not finite.
float round_all(float* t, int64_t rank) {
  const float most = most_of(t, rank);
  const bool finite = most <= std::numeric_limits<float>::max();
  auto* codes = reinterpret_cast<char*>(t);
  const int64_t size = 4 * ceil_div(rank, 4);
  if (!finite || most < 0x1p-100f) {  // too small to divide by, and to matter
    std::memset(codes, 0, static_cast<size_t>(size));
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const float inverse = 127.0f / most;
  int64_t r = 0;  // a code never lies beyond its t
  for (; r + 8 <= rank; r += 8) round_t<8>(t + r, inverse, codes + r);
  for (; r < rank; ++r) round_t<1>(t + r, inverse, codes + r);
  std::memset(codes + rank, 0, static_cast<size_t>(size - rank));
  return most / 127.0f;
}

// A row of PackedT whose codes are not rounded yet; weight: what their scale is multiplied by.
void quantize_t(float* row, int64_t rank, float weight) {
  row[0] = weight * round_all(row + kBesideCodes, rank);
  const auto* codes = reinterpret_cast<const int8_t*>(row + kBesideCodes);
  const int32_t start = -128 * std::accumulate(codes, codes + rank, 0);
  std::memcpy(row + 1, &start, sizeof start);
}

}  // namespace

// Neighbouring rows of one sequence have one adapter: body(adapter, their begin, their end).
template <typename Body>
void LinearJob::for_each_adapter(int64_t row_begin, int64_t row_end, Body body) const {
  for (int64_t m = row_begin; m < row_end;) {
    const NodeAdapter* adapter = of_row(m);
    const int64_t next = (m / call_.sequence_length + 1) * call_.sequence_length;
    const int64_t end = std::min(row_end, next);
    if (adapter != nullptr) body(*adapter, m, end);
    m = end;
  }
}

void LinearJob::down(Worker& worker, int64_t item) const {
  if (call_.rows == 1) return down_slice(worker, item, 0, 1);
  for (int64_t slice = 0; slice < weights_.slice_count; ++slice) {
    down_slice(worker, slice, group_begin(item), group_begin(item + 1));
  }
}

void LinearJob::down_slice(Worker& worker, int64_t slice, int64_t row_begin,
                           int64_t row_end) const {
  for_each_adapter(row_begin, row_end, [&](const NodeAdapter& adapter, int64_t begin, int64_t end) {
    for (const Branch& branch : adapter.slices[static_cast<size_t>(slice)]) {
      is_packed(branch) ? down_packed(worker, branch, begin, end)
                        : down_branch(worker.x, branch, begin, end);
    }
  });
}

void LinearJob::down_branch(const Prepared& x, const Branch& branch, int64_t row_begin,
                            int64_t row_end) const {
  for (int64_t m = row_begin; m < row_end; ++m) {
    call_.kernels->side_branch_down(branch.factors, weights_.in_features, branch.weight,
                                    input_row(x, m), t_of(branch, m));
  }
}

// t = A·x of the rows, then each row's as int8 in its own place.
void LinearJob::down_packed(Worker& worker, const Branch& branch, int64_t row_begin,
                            int64_t row_end) const {
  const kernels::PackedFactors& factors = *branch.packed;
  const auto multiply = [&](int64_t row, const kernels::Activations& x) {
    call_.kernels->linear(factors.a, x, 0, ceil_div(factors.rank, kPanelRows),
                          t_of(branch, row) + kBesideCodes, call_.adapters->t_size(),
                          worker.linear);
  };
  if (!refined()) multiply(row_begin, quantized(worker, {row_begin, true}, row_end));
  for (int64_t m = row_begin; m < row_end; ++m) {
    if (refined()) multiply(m, first_codes(worker, m));
    quantize_t(t_of(branch, m), factors.rank, branch.packed_weight);
  }
}

// The slices that the tile touches, each with its own panel numbers.
void LinearJob::up(const Tile& tile, const Target& target) const {
  int64_t row = 0;  // first row of the slice; a multiple of 16 but for a slice alone
  for (int64_t slice = 0; slice < weights_.slice_count; ++slice) {
    const int64_t first = row / kPanelRows;
    const int64_t last = first + ceil_div(weights_.slices[slice], kPanelRows);
    const int64_t from = std::max(tile.panel_begin, first);
    const int64_t to = std::min(tile.panel_end, last);
    if (from < to) up_slice(slice, row, {tile.row_begin, tile.row_end, from, to}, target);
    row += weights_.slices[slice];
  }
}

void LinearJob::up_slice(int64_t slice, int64_t slice_row, const Tile& tile,
                         const Target& target) const {
  const int64_t first = slice_row / kPanelRows;
  for_each_adapter(tile.row_begin, tile.row_end, [&](const NodeAdapter& adapter, int64_t begin,
                                                     int64_t end) {
    const Target to{target.y + (begin - tile.row_begin) * target.stride + slice_row, target.stride};
    const Tile of_slice{begin, end, tile.panel_begin - first, tile.panel_end - first};
    const RowChange* rows = adapter.rows[static_cast<size_t>(slice)];
    if (rows != nullptr) change_rows(*rows, weights_.slices[slice], of_slice, to);
    for (const Branch& branch : adapter.slices[static_cast<size_t>(slice)]) {
      up_branch(branch, weights_.slices[slice], of_slice, to);
    }
  });
}

// y, which is W·x so far, times a factor for each of its columns, plus the adapter's bias.
void LinearJob::change_rows(const RowChange& rows, int64_t out_features, const Tile& tile,
                            const Target& target) const {
  const int64_t from = tile.panel_begin * kPanelRows;
  const int64_t to = std::min(tile.panel_end * kPanelRows, out_features);
  for (int64_t m = 0; m < tile.row_end - tile.row_begin; ++m) {
    float* y = target.y + m * target.stride;
    if (!rows.factors.empty()) {
      for (int64_t i = from; i < to; ++i) y[i] *= rows.factors[static_cast<size_t>(i)];
    }
    if (rows.bias.empty()) continue;
    for (int64_t i = from; i < to; ++i) y[i] += rows.bias[static_cast<size_t>(i)];
  }
}

void LinearJob::up_branch(const Branch& branch, int64_t out_features, const Tile& tile,
                          const Target& target) const {
  const float* t = t_of(branch, tile.row_begin);
  const int64_t rows = tile.row_end - tile.row_begin, stride = call_.adapters->t_size();
  if (is_packed(branch)) {
    return call_.kernels->side_branch_up_int8(*branch.packed, out_features, {rows, t, stride},
                                              tile.panel_begin, tile.panel_end, target.y,
                                              target.stride);
  }
  for (int64_t m = 0; m < rows; ++m) {
    call_.kernels->side_branch_up(branch.factors, out_features, t + m * stride, tile.panel_begin,
                                  tile.panel_end, target.y + m * target.stride);
  }
}

}  // namespace edgelora::ops
