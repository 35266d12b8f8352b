// SPDX-License-Identifier: Apache-2.0
// Memory in whole vectors of 16 bytes, conversions, and the loop of every elementwise kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace inpo_fast {
namespace cuda {

constexpr int kThreads = 256;
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T lane[N];
};

// Elements of the widest access.
template <class T>
constexpr int kWidth = 16 / sizeof(T);

// The type of one access of so many bytes.
template <int kBytes>
struct Access;
template <>
struct Access<16> {
  using Type = uint4;
};
template <>
struct Access<8> {
  using Type = uint2;
};
template <>
struct Access<4> {
  using Type = unsigned int;
};
template <>
struct Access<2> {
  using Type = unsigned short;
};

// Memory is accessed in words as wide as can be.
template <class T, int N>
using Words = typename Access<(sizeof(T) * N < 16 ? sizeof(T) * N : 16)>::Type;

// kOnce: nobody reads it again soon, so the cache keeps other things in its place.
template <int N, bool kOnce = false, class T>
__device__ __forceinline__ Vector<T, N> load(const T* data, int64_t i) {
  using Word = Words<T, N>;
  Vector<T, N> vector;
#pragma unroll
  for (int w = 0; w < static_cast<int>(sizeof(vector) / sizeof(Word)); ++w) {
    const Word* place = reinterpret_cast<const Word*>(data + i) + w;
    const Word word = kOnce ? __ldcs(place) : *place;
    memcpy(reinterpret_cast<char*>(&vector) + w * sizeof(Word), &word, sizeof(Word));
  }
  return vector;
}

template <bool kOnce = false, class T, int N>
__device__ __forceinline__ void store(T* data, int64_t i, const Vector<T, N>& vector) {
  using Word = Words<T, N>;
#pragma unroll
  for (int w = 0; w < static_cast<int>(sizeof(vector) / sizeof(Word)); ++w) {
    Word word;
    memcpy(&word, reinterpret_cast<const char*>(&vector) + w * sizeof(Word), sizeof(Word));
    // An assignment would be taken apart into stores of members.
    Word* place = reinterpret_cast<Word*>(data + i) + w;
    kOnce ? __stcs(place, word) : __stwb(place, word);
  }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ double to_float(double x) { return x; }

template <class T>
__device__ __forceinline__ double to_double(T x) {
  return static_cast<double>(to_float(x));
}

// A double rounded to T, by way of float. The conversions of pairs have several times the
// throughput of those of one value.
template <class T>
__device__ __forceinline__ T narrow(double x);
template <>
__device__ __forceinline__ double narrow<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ float narrow<float>(double x) {
  return static_cast<float>(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(double x) {
  return __low2half(__floats2half2_rn(static_cast<float>(x), 0.0f));
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(double x) {
  return __low2bfloat16(__floats2bfloat162_rn(static_cast<float>(x), 0.0f));
}

// Raises the bits of all threads of a warp at once; most often there are none.
__device__ __forceinline__ void raise(int32_t* status, int32_t bits) {
  bits = __reduce_or_sync(0xffffffffu, bits);
  if (bits != 0 && status != nullptr && (threadIdx.x & 31) == 0) atomicOr(status, bits);
}

// One element or vector of an operator: op.row(r) reads the constants of row r; op.load<N>(i) the
// operands of elements [i, i + N), op.store(row, operands, i) computes and writes them and returns
// status bits. A thread loads Op::kUnroll vectors before it computes, so that enough bytes are
// under way. Rows are per_row elements long.
template <class Op, int N>
__global__ void __launch_bounds__(kThreads)
    elementwise(const Op op, int64_t per_row, int64_t rows, int32_t* status) {
  using Operands = typename Op::template Operands<N>;
  constexpr int kUnroll = Op::kUnroll;
  int32_t bits = 0;
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    const auto row = op.row(r);
    const int64_t begin = r * per_row;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kUnroll * kThreads + threadIdx.x) * N;
    Operands operands[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * kThreads * N;
      if (i + N <= per_row) operands[u] = op.template load<N>(begin + i);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * kThreads * N;
      if (i + N <= per_row) bits |= op.template store<N>(row, operands[u], begin + i);
    }
    // What is left behind the last whole vector.
    const int64_t rest = per_row / N * N + threadIdx.x;
    if (N > 1 && blockIdx.x == 0 && rest < per_row) {
      bits |= op.template store<1>(row, op.template load<1>(begin + rest), begin + rest);
    }
  }
  raise(status, bits);
}

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Vectors need whole vectors in a row (or a single row) and memory that begins at one.
template <class Op>
int launch_elementwise(const Op& op, bool vectors, int64_t numel, int64_t per_row, int32_t* status,
                       cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  constexpr int N = Op::kLanes;
  const int64_t rows = numel / per_row;
  vectors = vectors && (rows == 1 || per_row % N == 0);
  const int64_t block = int64_t{Op::kUnroll} * kThreads * (vectors ? N : 1);
  const dim3 grid(static_cast<unsigned>((per_row + block - 1) / block),
                  static_cast<unsigned>(rows < 65535 ? rows : 65535));
  if (vectors) {
    elementwise<Op, N><<<grid, kThreads, 0, stream>>>(op, per_row, rows, status);
  } else {
    elementwise<Op, 1><<<grid, kThreads, 0, stream>>>(op, per_row, rows, status);
  }
  return cudaGetLastError();
}

// Calls f(T{}) with the type of a dtype; double only where kDouble.
template <bool kDouble, class F>
int with_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Double:
      if constexpr (kDouble) return f(double{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda
}  // namespace inpo_fast
