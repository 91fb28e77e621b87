// The avx512_vnni and amx_bf16 sources once more, their intrinsics SIMDe's: the very same code runs
// on a CPU without AVX-512, in a namespace of its own beside the native table. Compiled with AVX2's
// flags.
#include <immintrin.h>

#include <cstring>

#define SIMDE_ENABLE_NATIVE_ALIASES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#define SIMDE_NO_INLINE
#include <simde/x86/avx512.h>
#pragma GCC diagnostic pop

#include "emulated_avx512.h"

#define avx512_vnni avx512_vnni_emulated
#include "kernels/avx512_vnni/elementwise.cc"
#include "kernels/avx512_vnni/linear.cc"
#include "kernels/avx512_vnni/side_branch_int8.cc"
#include "kernels/avx512_vnni/table.cc"

#define amx_bf16 amx_bf16_emulated
#include "kernels/amx_bf16/linear.cc"
#include "kernels/amx_bf16/table.cc"
