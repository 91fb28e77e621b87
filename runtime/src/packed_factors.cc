#include "src/packed_factors.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/activation_block.h"
#include "kernels/half.h"

namespace edgelora {
namespace {

constexpr int64_t kPanel = kernels::kPanelRows;
constexpr int64_t kBlock = kernels::kActivationBlock;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

float value_at(const kernels::Factors& factors, const void* base, int64_t index) {
  return factors.half ? kernels::half_to_float(kernels::load_u16(base, index))
                      : kernels::load_f32(base, index);
}

}  // namespace

PackedFactors::PackedFactors(const kernels::Factors& factors, int64_t in_features,
                             int64_t out_features) {
  pack_a(factors, in_features);
  pack_b(factors, ceil_div(out_features, kPanel));
  view_.rank = factors.rank;
  view_.b = b_.data();
}

void PackedFactors::pack_a(const kernels::Factors& factors, int64_t in_features) {
  const int64_t blocks = ceil_div(in_features, kBlock), panels = ceil_div(factors.rank, kPanel);
  a_codes_.resize(static_cast<size_t>(panels * blocks * kBlock * kPanel));
  a_scales_.resize(static_cast<size_t>(panels * blocks * kPanel));
  for (int64_t r = 0; r < factors.rank; ++r) {
    const int64_t panel = r / kPanel, row = r % kPanel;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t k = b * kBlock, count = std::min(kBlock, in_features - k);
      float values[kBlock];
      for (int64_t i = 0; i < count; ++i) {
        values[i] = value_at(factors, factors.a, r * in_features + k + i);
      }
      int8_t codes[kBlock];
      float scale = 0.0f;
      kernels::quantize_block(values, count, codes, &scale);
      a_scales_[static_cast<size_t>((panel * blocks + b) * kPanel + row)] =
          kernels::float_to_half(scale);
      int8_t* to = a_codes_.data() + ((panel * blocks + b) * kBlock * kPanel + 4 * row);
      for (int64_t q = 0; q < kBlock / 4; ++q) std::memcpy(to + 64 * q, codes + 4 * q, 4);
    }
  }
  view_.a.format = kernels::Format::kInt8;
  view_.a.in_features = in_features;
  view_.a.out_features = factors.rank;
  view_.a.block_size = kBlock;
  view_.a.codes = a_codes_.data();
  view_.a.scales = a_scales_.data();
}

void PackedFactors::pack_b(const kernels::Factors& factors, int64_t panels) {
  const int64_t stride = 32 * (1 + ceil_div(factors.rank, 2));  // bytes of a panel
  b_.resize(static_cast<size_t>(panels * stride));
  for (int64_t row = 0; row < panels * kPanel; ++row) {
    const int64_t panel = row / kPanel, i = row % kPanel;
    const auto value = [&](int64_t r) {
      return value_at(factors, factors.b, (panel * factors.rank + r) * kPanel + i);
    };
    float most = 0.0f;
    for (int64_t r = 0; r < factors.rank; ++r) most = std::max(most, std::fabs(value(r)));
    const uint16_t scale = kernels::float_to_half(most / 127.0f);
    const float step = kernels::half_to_float(scale);
    const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
    uint8_t* to = b_.data() + panel * stride;
    std::memcpy(to + 2 * i, &scale, 2);
    for (int64_t r = 0; r < factors.rank; ++r) {
      const float code = std::clamp(std::nearbyint(value(r) * inverse), -127.0f, 127.0f);
      to[32 + r / 2 * 32 + 2 * i + r % 2] = static_cast<uint8_t>(static_cast<int8_t>(code));
    }
  }
}

}  // namespace edgelora
