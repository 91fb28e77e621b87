// How many parts of size b hold a.
#pragma once

#include <cstdint>

namespace edgelora::kernels {
namespace {  // a copy for each file, as in panels.h

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace edgelora::kernels
