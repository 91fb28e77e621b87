// The avx_vnni sources once more with SIMDe's vpdpbusd: the very same code runs on a CPU without
// it, in a namespace of its own beside the native table. Compiled with AVX2's flags.
#include <immintrin.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#define SIMDE_NO_INLINE
#include <simde/x86/avx512.h>
#pragma GCC diagnostic pop

#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32

#define avx_vnni avx_vnni_emulated
#include "kernels/avx_vnni/linear.cc"
#include "kernels/avx_vnni/table.cc"
