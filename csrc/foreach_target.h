// SPDX-License-Identifier: Apache-2.0
// Compiles the kernels of the file INPO_KERNELS once for each instruction set, in the namespace
// inpo_fast::INPO_TARGET. No include guard: each source file with kernels includes it once.
//
// Kernel files contain no lambda (clang would compile it for the baseline) and no std:: template
// (an instance made for AVX2 could be linked into the baseline).

#define INPO_TARGET baseline
#include INPO_KERNELS
#undef INPO_TARGET

#ifdef INPO_X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

#define INPO_TARGET avx2
#define INPO_AVX2 1
#include INPO_KERNELS
#undef INPO_AVX2
#undef INPO_TARGET

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// The version of a kernel to run here.
#define INPO_CHOOSE(...) (has_avx2() ? &avx2::__VA_ARGS__ : &baseline::__VA_ARGS__)

#else
#define INPO_CHOOSE(...) (&baseline::__VA_ARGS__)
#endif
