#include "src/packed_factors.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/activation_block.h"
#include "kernels/ceil_div.h"
#include "kernels/half.h"
#include "kernels/packed_factors.h"

namespace edgelora {
namespace {

constexpr int64_t kPanel = kernels::kPanelRows;
constexpr int64_t kBlock = kernels::kActivationBlock;

using kernels::ceil_div;

// The largest scale of a factor is brought to 2^14 … 2^15: float16 then tells scales down to 2^−29
// of it apart.
constexpr int kScaleExponent = 14;

// Values of a factor, times a power of two.
class Values {
 public:
  Values(const kernels::Factors& factors, const void* data, int64_t count)
      : half_(factors.half), data_(data) {
    float most = 0.0f;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, std::fabs((*this)[i]));
    exponent_ = most > 0.0f ? kScaleExponent - std::ilogb(most / 127.0f) : 0;
    power_ = std::ldexp(1.0f, exponent_);
  }

  float operator[](int64_t index) const {
    const float value = half_ ? kernels::half_to_float(kernels::load_u16(data_, index))
                              : kernels::load_f32(data_, index);
    return value * power_;
  }

  int exponent() const { return exponent_; }

 private:
  bool half_;
  const void* data_;
  int exponent_ = 0;
  float power_ = 1.0f;
};

// What codes are times, of values that share it.
struct Scale {
  explicit Scale(float most) : half(kernels::float_to_half(most / 127.0f)) {
    const float step = kernels::half_to_float(half);
    inverse = step > 0.0f ? 1.0f / step : 0.0f;
  }
  int8_t code(float value) const {
    return static_cast<int8_t>(std::clamp(std::nearbyint(value * inverse), -127.0f, 127.0f));
  }
  uint16_t half;
  float inverse;
};

int64_t b_panel_bytes(int64_t rank) { return kernels::packed_panel_bytes(ceil_div(rank, 4)); }

// Bytes of each part; the next begins at a multiple of 64.
struct Sizes {
  Sizes(int64_t rank, int64_t in_features, int64_t out_features) {
    const int64_t blocks = ceil_div(rank, kPanel) * ceil_div(in_features, kBlock);
    a_codes = blocks * kBlock * kPanel;
    a_scales = ceil_div(blocks * kPanel * 2, 64) * 64;
    b = ceil_div(ceil_div(out_features, kPanel) * b_panel_bytes(rank), 64) * 64;
  }
  int64_t a_codes, a_scales, b;
};

}  // namespace

int64_t PackedFactors::bytes(int64_t rank, int64_t in_features, int64_t out_features) {
  const Sizes sizes(rank, in_features, out_features);
  return sizes.a_codes + sizes.a_scales + sizes.b;
}

PackedFactors::PackedFactors(const kernels::Factors& factors, int64_t in_features,
                             int64_t out_features, uint8_t* memory) {
  const Sizes sizes(factors.rank, in_features, out_features);
  a_codes_ = reinterpret_cast<int8_t*>(memory);
  a_scales_ = reinterpret_cast<uint16_t*>(memory + sizes.a_codes);
  b_ = memory + sizes.a_codes + sizes.a_scales;
  const int a_exponent = pack_a(factors, in_features);
  const int b_exponent = pack_b(factors, ceil_div(out_features, kPanel));
  unit_ = std::ldexp(1.0f, -a_exponent - b_exponent);
  view_.rank = factors.rank;
  view_.b = b_;
}

int PackedFactors::pack_a(const kernels::Factors& factors, int64_t in_features) {
  const int64_t blocks = ceil_div(in_features, kBlock);
  const Values values(factors, factors.a, factors.rank * in_features);
  for (int64_t r = 0; r < factors.rank; ++r) {
    const int64_t panel = r / kPanel, row = r % kPanel;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = r * in_features + b * kBlock;
      const int64_t count = std::min(kBlock, in_features - b * kBlock);
      float most = 0.0f;
      for (int64_t i = 0; i < count; ++i) most = std::max(most, std::fabs(values[first + i]));
      const Scale scale(most);
      a_scales_[(panel * blocks + b) * kPanel + row] = scale.half;
      int8_t* to = a_codes_ + ((panel * blocks + b) * kBlock * kPanel + 4 * row);
      for (int64_t i = 0; i < count; ++i) to[i / 4 * 64 + i % 4] = scale.code(values[first + i]);
    }
  }
  view_.a.format = kernels::Format::kInt8;
  view_.a.in_features = in_features;
  view_.a.out_features = factors.rank;
  view_.a.block_size = kBlock;
  view_.a.codes = a_codes_;
  view_.a.scales = a_scales_;
  return values.exponent();
}

int PackedFactors::pack_b(const kernels::Factors& factors, int64_t panels) {
  const int64_t stride = b_panel_bytes(factors.rank);
  const Values values(factors, factors.b, panels * kPanel * factors.rank);
  for (int64_t row = 0; row < panels * kPanel; ++row) {
    const int64_t panel = row / kPanel, i = row % kPanel;
    const auto value = [&](int64_t r) { return values[(panel * factors.rank + r) * kPanel + i]; };
    float most = 0.0f;
    for (int64_t r = 0; r < factors.rank; ++r) most = std::max(most, std::fabs(value(r)));
    const Scale scale(most);
    uint8_t* to = b_ + panel * stride;
    uint8_t* codes = to + kernels::kPackedScaleBytes;
    std::memcpy(to + 2 * i, &scale.half, 2);
    for (int64_t r = 0; r < factors.rank; ++r) {
      codes[r / 4 * 64 + 4 * i + r % 4] = static_cast<uint8_t>(scale.code(value(r)));
    }
  }
  return values.exponent();
}

}  // namespace edgelora
