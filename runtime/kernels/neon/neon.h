// Functions of the neon table. An ISA whose features include neon's may use them in its own.
#pragma once

#include "kernels/kernels.h"

namespace edgelora::kernels::neon {

#include "kernels/functions.inc"

}  // namespace edgelora::kernels::neon
