// NF4's sixteen values, and their bytes for the integer kernels.
#pragma once

#include <cstdint>

namespace edgelora::kernels {
namespace {

constexpr float kNf4Values[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// round(127·value): at most 1/254 of absmax away from the value (measured mean KL of a model:
// 0.0015). `linear` uses these; `linear_float` and `dequantize_row` use the values themselves.
constexpr float kNf4ByteScale = 127.0f;
constexpr int8_t kNf4Bytes[16] = {-127, -88, -67, -50, -36, -23, -12, 0,
                                  10,   20,  31,  43,  56,  71,  92,  127};

}  // namespace
}  // namespace edgelora::kernels
