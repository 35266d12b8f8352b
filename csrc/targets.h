// SPDX-License-Identifier: Apache-2.0
// Which instruction set runs. Kernels are compiled once for each (foreach_target.h).
#pragma once

#include <atomic>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define INPO_X86 1
#endif

// Says that no iteration of the next loop depends on another, although pointers may be equal.
#if defined(__clang__)
#define INPO_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INPO_INDEPENDENT _Pragma("GCC ivdep")
#else
#define INPO_INDEPENDENT
#endif

namespace inpo_fast {

// Set by use_simd; tests clear it to run the portable kernels.
inline std::atomic<bool> simd_allowed{true};

inline bool has_avx2() {
#ifdef INPO_X86
  // Every processor with AVX2 has F16C.
  static const bool supported = __builtin_cpu_supports("avx2");
  return supported && simd_allowed.load(std::memory_order_relaxed);
#else
  return false;
#endif
}

}  // namespace inpo_fast
