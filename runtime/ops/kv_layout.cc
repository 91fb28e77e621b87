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

// Half to even: what is added and taken away leaves no bits behind the point.
int8_t round_code(float value) {
  const float shifted = value + 0x1.8p23f;
  return static_cast<int8_t>(shifted - 0x1.8p23f);
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
  const int64_t panel = position / kPanel, row = position % kPanel, d = layout_.head_dim();
  if (layout_.exact()) {
    auto* to = reinterpret_cast<float*>(bytes_) + panel * d * kPanel + row;
    for (int64_t i = 0; i < d; ++i) to[i * kPanel] = key[i];
    return;
  }
  Quantized quantized;
  kernels.quantize_activations(key, d, quantized.codes, quantized.scales, quantized.sums);
  const int64_t width = layout_.key_width(), blocks = width / kBlock;
  uint8_t* to = bytes_ + panel * kPanel * width + 4 * row;
  for (int64_t q = 0; q < width / 4; ++q) std::memcpy(to + 64 * q, quantized.codes + 4 * q, 4);
  for (int64_t b = 0; b < blocks; ++b) {
    const uint16_t scale = kernels::float_to_half(quantized.scales[b]);
    std::memcpy(scales() + 2 * ((panel * blocks + b) * kPanel + row), &scale, 2);
  }
}

void KeyRows::prefetch(int64_t position) const {
  const int64_t panel = position / kPanel, row = position % kPanel;
  const int64_t width = layout_.exact() ? 4 * layout_.head_dim() : layout_.key_width();
  const uint8_t* to = bytes_ + panel * kPanel * width + 4 * row;
  for (int64_t i = 0; i < width * kPanel; i += kLineBytes) prefetch_for_write(to + i);
  if (layout_.exact()) return;
  const int64_t blocks = width / kBlock;
  for (int64_t b = 0; b < blocks; ++b) prefetch_for_write(scales() + 2 * (panel * blocks + b) * kPanel);
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
  const int64_t width = layout_.exact() ? 4 * layout_.head_dim() : layout_.key_width();
  std::memcpy(bytes_, other.bytes_, static_cast<size_t>(rows * width));
  if (layout_.exact()) return;
  std::memcpy(scales(), other.scales(), static_cast<size_t>(rows * width / 16));
}

void ValueRows::put(int64_t position, const float* value) {
  const int64_t d = layout_.head_dim();
  if (layout_.exact()) {
    auto* to = reinterpret_cast<float*>(bytes_) + position * kPanel;
    for (int64_t i = 0; i < d; ++i) to[i / kPanel * capacity_ * kPanel + i % kPanel] = value[i];
    return;
  }
  const kernels::BlockScale block = scale_of(value, d);
  std::memcpy(bytes_ + capacity_ * layout_.value_width() + 4 * position, &block.scale, 4);
  uint8_t* to = bytes_ + position / 4 * 64 + position % 4;
  for (int64_t i = 0; i < d; ++i) {
    const int8_t code = block.inverse == 0.0f ? int8_t{0} : round_code(value[i] * block.inverse);
    to[i / kPanel * panel_bytes() + i % kPanel * 4] = static_cast<uint8_t>(code);
  }
}

void ValueRows::prefetch(int64_t position) const {
  const int64_t column = layout_.exact() ? position * 4 * kPanel : position / 4 * kLineBytes;
  for (int64_t p = 0; p < layout_.value_width() / kPanel; ++p) {
    prefetch_for_write(bytes_ + p * panel_bytes() + column);
  }
  if (layout_.exact()) return;
  prefetch_for_write(bytes_ + capacity_ * layout_.value_width() + 4 * position);
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
  return reinterpret_cast<const float*>(bytes_ + capacity_ * layout_.value_width());
}

void ValueRows::copy_from(const ValueRows& other, int64_t positions) {
  const int64_t rows = KvLayout::capacity_for(positions);
  const int64_t bytes = rows * kPanel * (layout_.exact() ? 4 : 1);
  for (int64_t p = 0; p < layout_.value_width() / kPanel; ++p) {
    std::memcpy(bytes_ + p * panel_bytes(), other.bytes_ + p * other.panel_bytes(),
                static_cast<size_t>(bytes));
  }
  if (layout_.exact()) return;
  std::memcpy(bytes_ + capacity_ * layout_.value_width(),
              other.bytes_ + other.capacity_ * layout_.value_width(),
              static_cast<size_t>(positions * 4));
}

}  // namespace edgelora::ops
