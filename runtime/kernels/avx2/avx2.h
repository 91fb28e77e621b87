// Functions of the avx2 table. An ISA whose features include avx2's may use them in its own.
#pragma once

#include "kernels/kernels.h"

namespace edgelora::kernels::avx2 {

#include "kernels/functions.inc"

}  // namespace edgelora::kernels::avx2
