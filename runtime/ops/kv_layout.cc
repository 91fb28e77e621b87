#include "ops/kv_layout.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/activation_block.h"
#include "kernels/half.h"
#include "ops/prefetch.h"

namespace edgelora::ops {
namespace {

constexpr int64_t kPanel = kernels::kPanelRows;
constexpr int64_t kBlock = kernels::kActivationBlock;
constexpr uint16_t kHalfOne = 0x3c00;

// Values carry their scale in the softmax: as weights they have 1 everywhere.
constexpr int64_t kOnes = kMostHeadDim * kAttentionChunk / 128;
const std::array<uint16_t, kOnes>& ones() {
  static const auto values = [] {
    std::array<uint16_t, kOnes> all{};
    all.fill(kHalfOne);
    return all;
  }();
  return values;
}

// A row of D as blocks of 32 codes with a scale each.
struct Quantized {
  alignas(64) int8_t codes[kMostHeadDim];
  float scales[kMostHeadDim / kBlock];
  int32_t sums[kMostHeadDim / kBlock];
};

kernels::BlockScale scale_of(const float* x, int64_t n) {
  float most = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const float size = std::fabs(x[i]);
    finite = finite && size <= kernels::kLargestFinite;
    most = std::max(most, size);
  }
  return kernels::block_scale_of(most, finite);
}

kernels::Weights matrix(kernels::Format format, int64_t in_features, int64_t out_features,
                        const uint8_t* codes) {
  kernels::Weights weights{};
  weights.format = format;
  weights.in_features = in_features;
  weights.out_features = out_features;
  weights.codes = codes;
  return weights;
}

}  // namespace

void KeyRows::put(const kernels::KernelTable& kernels, int64_t position, const float* key) {
  const int64_t d = layout_.head_dim();
  uint8_t* to = row(position);
  if (layout_.exact()) {
    for (int64_t i = 0; i < d; ++i) std::memcpy(to + 64 * i, key + i, 4);
    return;
  }
  Quantized quantized;
  kernels.quantize_activations(key, d, quantized.codes, quantized.scales, quantized.sums);
  const int64_t width = layout_.key_width();
  for (int64_t q = 0; q < width / 4; ++q) std::memcpy(to + 64 * q, quantized.codes + 4 * q, 4);
  for (int64_t b = 0; b < width / kBlock; ++b) {
    const uint16_t half = kernels::float_to_half(quantized.scales[b]);
    std::memcpy(scale(position, b), &half, 2);
  }
}

void KeyRows::prefetch(int64_t position) const {
  const uint8_t* to = row(position);
  for (int64_t i = 0; i < row_bytes() / 4; ++i) prefetch_for_write(to + 64 * i);
  if (layout_.exact()) return;
  for (int64_t b = 0; b < row_bytes() / kBlock; ++b) prefetch_for_write(scale(position, b));
}

kernels::Weights KeyRows::weights(int64_t positions) const {
  if (layout_.exact()) {
    return matrix(kernels::Format::kFloat, layout_.head_dim(), positions, bytes_);
  }
  kernels::Weights weights =
      matrix(kernels::Format::kInt8, layout_.head_dim(), positions, bytes_);
  weights.block_size = kBlock;
  weights.scales = reinterpret_cast<const uint16_t*>(scales());
  return weights;
}

void KeyRows::copy_from(const KeyRows& other, int64_t positions) {
  const int64_t rows = (positions + kPanel - 1) / kPanel * kPanel;
  std::memcpy(bytes_, other.bytes_, static_cast<size_t>(rows * row_bytes()));
  if (layout_.exact()) return;
  std::memcpy(scales(), other.scales(), static_cast<size_t>(rows * row_bytes() / 16));
}

void ValueRows::put(int64_t position, const float* value) {
  const int64_t d = layout_.head_dim();
  if (layout_.exact()) {
    for (int64_t i = 0; i < d; ++i) {
      std::memcpy(column(position, i / kPanel) + i % kPanel * 4, value + i, 4);
    }
    return;
  }
  const kernels::BlockScale block = scale_of(value, d);
  std::memcpy(scale(position), &block.scale, 4);
  for (int64_t first = 0; first < d; first += kPanel) {
    uint8_t* to = column(position, first / kPanel);
    const int64_t count = std::min(kPanel, d - first);
    uint8_t codes[kPanel];  // apart from what scatters them: a loop for vector registers
    for (int64_t i = 0; i < count; ++i) {
      const float code = block.inverse == 0.0f ? 0.0f : value[first + i] * block.inverse;
      codes[i] = static_cast<uint8_t>(static_cast<int32_t>(kernels::round_half_even(code)));
    }
    for (int64_t i = 0; i < count; ++i) to[4 * i] = codes[i];
  }
}

void ValueRows::prefetch(int64_t position) const {
  for (int64_t p = 0; p < layout_.value_width() / kPanel; ++p) {
    prefetch_for_write(column(position, p));
  }
  if (!layout_.exact()) prefetch_for_write(scale(position));
}

kernels::Weights ValueRows::weights(int64_t begin, int64_t end) const {
  const bool exact = layout_.exact();
  kernels::Weights weights =
      matrix(exact ? kernels::Format::kFloat : kernels::Format::kInt8, end - begin,
             layout_.head_dim(), bytes_ + begin * kPanel * (exact ? 4 : 1));
  weights.panel_stride = panel_bytes();
  if (exact) return weights;
  weights.block_size = 128;
  weights.scales = ones().data();
  return weights;
}

const float* ValueRows::scales() const {
  if (layout_.exact()) return nullptr;
  return reinterpret_cast<const float*>(scale(0));
}

void ValueRows::copy_from(const ValueRows& other, int64_t positions) {
  const int64_t rows = KvLayout::capacity_for(positions);
  const int64_t bytes = rows * kPanel * (layout_.exact() ? 4 : 1);
  for (int64_t p = 0; p < layout_.value_width() / kPanel; ++p) {
    std::memcpy(bytes_ + p * panel_bytes(), other.bytes_ + p * other.panel_bytes(),
                static_cast<size_t>(bytes));
  }
  if (layout_.exact()) return;
  std::memcpy(scale(0), other.scale(0), static_cast<size_t>(positions * 4));
}

}  // namespace edgelora::ops
