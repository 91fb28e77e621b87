// float16 ↔ float32 in plain integer arithmetic, subnormals included.
#pragma once

#include <cstdint>
#include <cstring>

namespace edgelora::kernels {
namespace {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude < 0x0400u) {  // zero or subnormal: a multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const uint32_t exponent_shift = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
  const uint32_t bits = sign | ((magnitude << 13) + exponent_shift);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounded half to even; beyond 65504 Inf, NaN stays NaN.
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // a multiple of 2^-24: the sum leaves it in the lowest bits
    float size;
    std::memcpy(&size, &magnitude, sizeof size);
    const float shifted = size + 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &shifted, sizeof rounded);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  const uint32_t even = magnitude >> 13 & 1u;
  return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + even - 0x38000000u) >> 13));
}

// Rounded to bfloat16, half to even; NaN may become Inf.
inline float round_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t load_u16(const void* base, int64_t index) {  // unaligned
  uint16_t value;
  std::memcpy(&value, static_cast<const char*>(base) + 2 * index, sizeof value);
  return value;
}

inline float load_f32(const void* base, int64_t index) {  // unaligned
  float value;
  std::memcpy(&value, static_cast<const char*>(base) + 4 * index, sizeof value);
  return value;
}

}  // namespace
}  // namespace edgelora::kernels
