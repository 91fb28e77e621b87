// Functions of the scalar table.
#pragma once

#include "kernels/kernels.h"

namespace edgelora::kernels::scalar {

#include "kernels/functions.inc"

}  // namespace edgelora::kernels::scalar
