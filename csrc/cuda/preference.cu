// SPDX-License-Identifier: Apache-2.0
// The preference errors and their backward on a GPU.
#include "vector.cuh"

namespace inpo_fast {
namespace cuda {
namespace {

constexpr int kErrorThreads = 1024;
// Vectors that a thread loads before it computes.
constexpr int kUnroll = 2;

template <class T>
using Residual = decltype(to_float(T{}));

// e_theta, e_ref and d, or their sums over elements.
struct Sums {
  double value[3] = {0.0, 0.0, 0.0};

  template <class R>
  __device__ __forceinline__ void add(int k, R residual) {
    const double wide = static_cast<double>(residual);
    value[k] = fma(wide, wide, value[k]);
  }

  // The sum over a warp, in lane 0, always in the same order.
  __device__ __forceinline__ void reduce_warp() {
#pragma unroll
    for (int k = 0; k < 3; ++k) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        value[k] += __shfl_down_sync(0xffffffffu, value[k], offset);
      }
    }
  }
};

__device__ __forceinline__ void write_means(const Sums& total, const ErrorArguments& arguments,
                                            const Sink (&results)[3], int64_t sample) {
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const bool absent = k > 0 && !arguments.has_ref;
    // 0 / 0, for a sample without elements, is NaN.
    const double mean = absent ? 0.0 : total.value[k] / static_cast<double>(arguments.per_sample);
    if (results[k].dtype == ScalarType::Double) {
      static_cast<double*>(results[k].data)[sample] = mean;
    } else {
      static_cast<float*>(results[k].data)[sample] = static_cast<float>(mean);
    }
  }
}

struct Results {
  Sink sinks[3];
};

// Block (i, s) sums every blocks-th piece of sample s. One block per sample writes the means;
// several write their sums.
template <class T, class M, bool kRef, int N>
__global__ void __launch_bounds__(kErrorThreads)
    sum_errors(const ErrorArguments arguments, const Results results, int64_t batch) {
  using R = Residual<T>;
  __shared__ double shared[3][kErrorThreads / 32];
  const auto* theta = static_cast<const T*>(arguments.theta.data);
  const auto* ref = static_cast<const T*>(arguments.ref.data);
  const auto* target = static_cast<const M*>(arguments.target.data);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kErrorThreads * N;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  for (int64_t sample = blockIdx.y; sample < batch; sample += gridDim.y) {
    const int64_t begin = sample * arguments.per_sample;
    Sums sums;
    int64_t i = (static_cast<int64_t>(blockIdx.x) * kErrorThreads + threadIdx.x) * N;
    while (i + N <= arguments.per_sample) {
      Vector<T, N> a[kUnroll], b[kUnroll];
      Vector<M, N> c[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * step + N > arguments.per_sample) continue;
        a[u] = load<N>(theta, begin + i + u * step);
        // The backward of most losses reads the other two.
        if constexpr (kRef) b[u] = load<N, true>(ref, begin + i + u * step);
        c[u] = load<N>(target, begin + i + u * step);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * step + N > arguments.per_sample) continue;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const R wide_theta = to_float(a[u].lane[k]), wide_target = to_float(c[u].lane[k]);
          sums.add(0, wide_theta - wide_target);
          if constexpr (kRef) {
            const R wide_ref = to_float(b[u].lane[k]);
            sums.add(1, wide_ref - wide_target);
            sums.add(2, wide_theta - wide_ref);
          }
        }
      }
      i += kUnroll * step;
    }
    sums.reduce_warp();
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < 3; ++k) shared[k][warp] = sums.value[k];
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int k = 0; k < 3; ++k) sums.value[k] = shared[k][lane];
      sums.reduce_warp();
      if (lane == 0) {
        if (gridDim.x == 1) {
          write_means(sums, arguments, results.sinks, sample);
        } else {
          double* out = arguments.sums + 3 * (sample * gridDim.x + blockIdx.x);
          for (int k = 0; k < 3; ++k) out[k] = sums.value[k];
        }
      }
    }
    __syncthreads();
  }
}

// One warp per sample adds the sums of its blocks.
__global__ void __launch_bounds__(kThreads)
    finish_errors(const ErrorArguments arguments, const Results results, int64_t batch) {
  const int64_t sample = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x & 31;
  if (sample >= batch) return;
  Sums sums;
  for (int64_t block = lane; block < arguments.blocks; block += 32) {
    const double* in = arguments.sums + 3 * (sample * arguments.blocks + block);
    for (int k = 0; k < 3; ++k) sums.value[k] += in[k];
  }
  sums.reduce_warp();
  if (lane == 0) write_means(sums, arguments, results.sinks, sample);
}

// The backward reads what the forward has just read. It goes through every sample from its end, and
// through all samples side by side, as that did from the beginning: so it meets first what the
// cache still holds, which its own result does not drive out.
template <class T, class M, bool kRef, int N>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const BackwardArguments arguments, int64_t rows) {
  using R = Residual<T>;
  const int64_t row = blockIdx.x % rows;
  const int64_t piece = gridDim.x / rows - 1 - blockIdx.x / rows;
  const double a = arguments.a.at(row, 0), b = arguments.b.at(row, 0);
  const int64_t begin = row * arguments.per_sample;
  const int64_t first = (piece * kUnroll * kThreads + threadIdx.x) * N;
  Vector<T, N> theta[kUnroll], ref[kUnroll];
  Vector<M, N> target[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kThreads * N;
    if (i + N > arguments.per_sample) continue;
    theta[u] = load<N>(static_cast<const T*>(arguments.theta.data), begin + i);
    if constexpr (kRef) ref[u] = load<N>(static_cast<const T*>(arguments.ref.data), begin + i);
    target[u] = load<N>(static_cast<const M*>(arguments.target.data), begin + i);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kThreads * N;
    if (i + N > arguments.per_sample) continue;
    Vector<T, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const R wide = to_float(theta[u].lane[k]);
      const R from_target = wide - to_float(target[u].lane[k]);
      double value = a * static_cast<double>(from_target);
      if constexpr (kRef) {
        const R from_ref = wide - to_float(ref[u].lane[k]);
        value = value + b * static_cast<double>(from_ref);
      }
      out.lane[k] = narrow<T>(value);
    }
    store<true>(static_cast<T*>(arguments.out.data), begin + i, out);
  }
}

// Calls f(T{}, M{}) with the types of theta and target: the same, or float beside 16 bits.
template <class F>
int with_types(ScalarType theta, ScalarType target, const F& f) {
  return with_type<true>(theta, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2) {
      if (target == ScalarType::Float) return f(T{}, float{});
    }
    return f(T{}, T{});
  });
}

}  // namespace

int errors(const ErrorArguments& arguments, int64_t batch, const Sink (&results)[3], void* stream) {
  if (batch == 0) return cudaSuccess;
  const auto queue = static_cast<cudaStream_t>(stream);
  const Results sinks{{results[0], results[1], results[2]}};
  const dim3 grid(static_cast<unsigned>(arguments.blocks),
                  static_cast<unsigned>(batch < 65535 ? batch : 65535));
  const int error =
      with_types(arguments.theta.dtype, arguments.target.dtype, [&](auto theta, auto target) {
        using T = decltype(theta);
        using M = decltype(target);
        // Eight 16-bit elements at once would need more registers than so many threads have.
        constexpr int N = kWidth<T> < 4 ? kWidth<T> : 4;
        const bool vectors = arguments.per_sample % N == 0 && aligned(arguments.theta.data) &&
                             aligned(arguments.ref.data) && aligned(arguments.target.data);
        const auto kernel = [&] {
          if (arguments.has_ref) {
            return vectors ? &sum_errors<T, M, true, N> : &sum_errors<T, M, true, 1>;
          }
          return vectors ? &sum_errors<T, M, false, N> : &sum_errors<T, M, false, 1>;
        }();
        kernel<<<grid, kErrorThreads, 0, queue>>>(arguments, sinks, batch);
        return static_cast<int>(cudaGetLastError());
      });
  if (error != cudaSuccess || arguments.blocks == 1) return error;
  constexpr int64_t kSamples = kThreads / 32;
  const auto blocks = static_cast<unsigned>((batch + kSamples - 1) / kSamples);
  finish_errors<<<blocks, kThreads, 0, queue>>>(arguments, sinks, batch);
  return cudaGetLastError();
}

int backward(const BackwardArguments& arguments, int64_t numel, void* stream) {
  if (numel == 0) return cudaSuccess;
  const int64_t rows = numel / arguments.per_sample;
  return with_types(arguments.theta.dtype, arguments.target.dtype, [&](auto theta, auto target) {
    using T = decltype(theta);
    using M = decltype(target);
    constexpr int N = kWidth<T> < 4 ? kWidth<T> : 4;
    const bool vectors = arguments.per_sample % N == 0 && aligned(arguments.theta.data) &&
                         aligned(arguments.ref.data) && aligned(arguments.target.data) &&
                         aligned(arguments.out.data);
    const auto kernel = [&] {
      if (arguments.ref.data != nullptr) {
        return vectors ? &backward_kernel<T, M, true, N> : &backward_kernel<T, M, true, 1>;
      }
      return vectors ? &backward_kernel<T, M, false, N> : &backward_kernel<T, M, false, 1>;
    }();
    const int64_t piece = int64_t{kUnroll} * kThreads * (vectors ? N : 1);
    const int64_t blocks = rows * ((arguments.per_sample + piece - 1) / piece);
    // A grid has no more, and the cast would wrap around without a word.
    if (blocks > INT32_MAX) return static_cast<int>(cudaErrorInvalidConfiguration);
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        arguments, rows);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace cuda
}  // namespace inpo_fast
