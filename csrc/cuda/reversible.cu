// SPDX-License-Identifier: Apache-2.0
// The reversible affine update on a GPU. The arithmetic is that of the CPU (arithmetic.inl).
#define INPO_TARGET gpu
#include <type_traits>

#include "vector.cuh"
// After it: the arithmetic is written in the terms of kernels.h.
#include "arithmetic.inl"

namespace inpo_fast {
namespace cuda {
namespace {

// The model outputs of a vector, and (b*y + c1*m1) + c2*m2.
template <class M, int kOutputs, int N>
struct Outputs {
  Vector<M, N> m[kOutputs > 0 ? kOutputs : 1];

  __device__ __forceinline__ void load(const Source& m1, const Source& m2, int64_t i) {
    if constexpr (kOutputs > 0) m[0] = cuda::load<N>(static_cast<const M*>(m1.data), i);
    if constexpr (kOutputs > 1) m[1] = cuda::load<N>(static_cast<const M*>(m2.data), i);
  }

  __device__ __forceinline__ double increment(const Coefficients& row, double y, int k) const {
    double total = row.b * y;
    if constexpr (kOutputs > 0) total = total + row.c1 * to_double(m[0].lane[k]);
    if constexpr (kOutputs > 1) total = total + row.c2 * to_double(m[1].lane[k]);
    return total;
  }
};

// --- Float states ---

template <class T, class M, bool kInverse, int kOutputs>
struct Affine {
  static constexpr int kLanes = kWidth<T>;
  static constexpr int kUnroll = sizeof(T) == 2 ? 1 : 2;
  AffineArguments arguments;

  template <int N>
  struct Operands {
    Vector<T, N> x, y;
    Outputs<M, kOutputs, N> outputs;
  };

  __device__ Coefficients row(int64_t r) const { return Coefficients(arguments.coef, r); }

  template <int N>
  __device__ __forceinline__ Operands<N> load(int64_t i) const {
    Operands<N> o;
    o.x = cuda::load<N>(static_cast<const T*>(arguments.x.data), i);
    o.y = cuda::load<N>(static_cast<const T*>(arguments.y.data), i);
    o.outputs.load(arguments.m1, arguments.m2, i);
    return o;
  }

  template <int N>
  __device__ __forceinline__ int32_t store(const Coefficients& row, const Operands<N>& o,
                                           int64_t i) const {
    Vector<T, N> out;
    bool finite = true;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double delta = o.outputs.increment(row, to_double(o.y.lane[k]), k);
      const double x = to_double(o.x.lane[k]);
      out.lane[k] = narrow<T>(kInverse ? (x - delta) / row.a : row.a * x + delta);
      finite &= isfinite(to_float(out.lane[k]));
    }
    cuda::store(static_cast<T*>(arguments.out.data), i, out);
    return finite ? 0 : kStatusNonfinite;
  }
};

// --- Lattice states ---

template <class M, bool kInverse, int kOutputs>
struct Lattice {
  static constexpr int kLanes = kWidth<int32_t>;
  static constexpr int kUnroll = 2;
  LatticeArguments arguments;

  template <int N>
  struct Operands {
    Vector<int32_t, N> z, y;
    Outputs<M, kOutputs, N> outputs;
  };

  __device__ Coefficients row(int64_t r) const { return Coefficients(arguments.coef, r); }

  template <int N>
  __device__ __forceinline__ Operands<N> load(int64_t i) const {
    Operands<N> o;
    o.z = cuda::load<N>(arguments.z, i);
    o.y = cuda::load<N>(arguments.y, i);
    o.outputs.load(arguments.m1, arguments.m2, i);
    return o;
  }

  // The increment of lane k, not yet rounded.
  template <int N>
  __device__ __forceinline__ double increment(const Coefficients& row, const Operands<N>& o,
                                              int k) const {
    const float y = static_cast<float>(o.y.lane[k]) * arguments.unit.resolution;
    return o.outputs.increment(row, to_double(y), k);
  }

  template <int N>
  __device__ __forceinline__ int32_t store(const Coefficients& row, const Operands<N>& o,
                                           int64_t i) const {
    Vector<int32_t, N> out;
    bool fits = true;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      // Beside kRounder a double is an integer, below its exponent, unless it is 2^51 or more.
      const double scaled = increment(row, o, k) * arguments.unit.inverse;
      const uint64_t sum = gpu::bits_as<uint64_t>(scaled + gpu::kRounder);
      const int64_t q = static_cast<int64_t>(sum - gpu::bits_as<uint64_t>(gpu::kRounder));
      const int64_t z = o.z.lane[k];
      const int64_t value = kInverse ? z - q : z + q;
      out.lane[k] = static_cast<int32_t>(value);
      fits &= (sum >> 52) == 0x433 && out.lane[k] == value;
    }
    gpu::Flag out_of_range = 0, nonfinite = 0;
    if (!fits) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const double q = gpu::quantize(increment(row, o, k), arguments.unit.inverse, nonfinite);
        const double z = gpu::from_int32(o.z.lane[k]);
        out.lane[k] = gpu::saturate(kInverse ? z - q : z + q, out_of_range);
      }
    }
    cuda::store(arguments.out, i, out);
    return gpu::status_bits(out_of_range, nonfinite);
  }
};

template <class M, bool kInverse, int kOutputs>
struct LatticeScaled : Lattice<M, kInverse, kOutputs> {
  using Base = Lattice<M, kInverse, kOutputs>;
  using Base::arguments;
  static constexpr int kUnroll = 1;

  // The inverse scales by the exchanged ratio.
  struct Row {
    Coefficients coef;
    Divisor n, d;
    double bound;
  };

  template <int N>
  struct Operands {
    typename Base::template Operands<N> plain;
    Vector<int64_t, N> buffer;
  };

  __device__ Row row(int64_t r) const {
    const int64_t* ratio = arguments.ratio + (arguments.ratio_by_sample ? 4 * r : 0);
    const Divisor n(ratio[kInverse ? 1 : 0]), d(ratio[kInverse ? 0 : 1]);
    return {Base::row(r), n, d, gpu::scaled_bound(n, d)};
  }

  template <int N>
  __device__ __forceinline__ Operands<N> load(int64_t i) const {
    return {Base::template load<N>(i), cuda::load<N>(arguments.buffer, i)};
  }

  template <int N>
  __device__ __forceinline__ int32_t store(const Row& row, const Operands<N>& o, int64_t i) const {
    // Buffers are most often far below their bound, and cost half as much then.
    uint64_t all = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) all |= static_cast<uint64_t>(o.buffer.lane[k]);
    if (row.n.value <= row.d.value) {
      return all >> 32 == 0 ? scale<true, true>(row, o, i) : scale<true, false>(row, o, i);
    }
    return all >> 32 == 0 ? scale<false, true>(row, o, i) : scale<false, false>(row, o, i);
  }

  template <bool kContract, bool kSmall, int N>
  __device__ __forceinline__ int32_t scale(const Row& row, const Operands<N>& o, int64_t i) const {
    Vector<int32_t, N> out;
    Vector<int64_t, N> buffer_out;
    gpu::Flag out_of_range = 0, nonfinite = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double increment = this->increment(row.coef, o.plain, k);
      const double q = gpu::quantize(increment, arguments.unit.inverse, nonfinite);
      const double delta = gpu::clamp(q, -kIncrementBound, kIncrementBound);
      double value = gpu::from_int32(o.plain.z.lane[k]);
      if (kInverse) {
        const double whole = value - delta;
        value = gpu::clamp(whole, -row.bound, row.bound);
        out_of_range |= value == whole ? 0 : 1;
      }
      uint64_t kept = static_cast<uint64_t>(o.buffer.lane[k]);
      const double scaled = kContract ? gpu::contract<kSmall>(value, kept, row.n, row.d)
                                      : gpu::expand<kSmall>(value, kept, row.d, row.n);
      buffer_out.lane[k] = static_cast<int64_t>(kept);
      out.lane[k] = gpu::saturate(kInverse ? scaled : scaled + delta, out_of_range);
    }
    cuda::store(arguments.out, i, out);
    cuda::store(arguments.buffer_out, i, buffer_out);
    return gpu::status_bits(out_of_range, nonfinite);
  }
};

// --- Into and out of the lattice ---

template <class T>
struct Encode {
  static constexpr int kLanes = 4;
  static constexpr int kUnroll = 2;
  EncodeArguments arguments;

  template <int N>
  using Operands = Vector<T, N>;

  __device__ double row(int64_t r) const { return arguments.scale.at(r, 0); }

  template <int N>
  __device__ __forceinline__ Vector<T, N> load(int64_t i) const {
    return cuda::load<N>(static_cast<const T*>(arguments.x.data), i);
  }

  template <int N>
  __device__ __forceinline__ int32_t store(double scale, const Vector<T, N>& x, int64_t i) const {
    Vector<int32_t, N> out;
    gpu::Flag out_of_range = 0, nonfinite = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double value = to_double(x.lane[k]) * scale;
      const double q = gpu::quantize(value, arguments.unit.inverse, nonfinite);
      out.lane[k] = gpu::saturate(q, out_of_range);
    }
    cuda::store(arguments.out, i, out);
    return gpu::status_bits(out_of_range, nonfinite);
  }
};

template <class T>
struct Decode {
  static constexpr int kLanes = 4;
  static constexpr int kUnroll = 2;
  DecodeArguments arguments;

  template <int N>
  using Operands = Vector<int32_t, N>;

  __device__ double row(int64_t r) const { return arguments.scale.at(r, 0); }

  template <int N>
  __device__ __forceinline__ Vector<int32_t, N> load(int64_t i) const {
    return cuda::load<N>(arguments.z, i);
  }

  template <int N>
  __device__ __forceinline__ int32_t store(double scale, const Vector<int32_t, N>& z,
                                           int64_t i) const {
    Vector<T, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float value = static_cast<float>(z.lane[k]) * arguments.unit.resolution;
      const float scaled = static_cast<float>(to_double(value) * scale);
      out.lane[k] = narrow<T>(static_cast<double>(scaled));
    }
    for (int64_t copy = 0; copy < arguments.copies; ++copy) {
      cuda::store(static_cast<T*>(arguments.out.data), i + copy * arguments.numel, out);
    }
    return 0;
  }
};

// Calls f(M{}, count) with the type of the model outputs and their number, 0, 1 or 2.
template <bool kDouble, class F>
int with_outputs(const Source& m1, const Source& m2, const F& f) {
  if (m1.data == nullptr) return f(float{}, std::integral_constant<int, 0>{});
  return with_type<kDouble>(m1.dtype, [&](auto output) {
    if (m2.data == nullptr) return f(output, std::integral_constant<int, 1>{});
    return f(output, std::integral_constant<int, 2>{});
  });
}

bool vectors(const AffineArguments& a) {
  return aligned(a.x.data) && aligned(a.y.data) && aligned(a.m1.data) && aligned(a.m2.data) &&
         aligned(a.out.data);
}

bool vectors(const LatticeArguments& a) {
  return aligned(a.z) && aligned(a.y) && aligned(a.buffer) && aligned(a.m1.data) &&
         aligned(a.m2.data) && aligned(a.out) && aligned(a.buffer_out);
}

}  // namespace

int affine(const AffineArguments& arguments, bool inverse, int64_t numel, int32_t* status,
           void* stream) {
  const auto launch = [&](const auto& op) {
    return launch_elementwise(op, vectors(arguments), numel, arguments.per_row, status,
                              static_cast<cudaStream_t>(stream));
  };
  return with_type<true>(arguments.x.dtype, [&](auto state) {
    using T = decltype(state);
    return with_outputs<sizeof(T) == 8>(arguments.m1, arguments.m2, [&](auto output, auto count) {
      using M = decltype(output);
      constexpr int kOutputs = decltype(count)::value;
      return inverse ? launch(Affine<T, M, true, kOutputs>{arguments})
                     : launch(Affine<T, M, false, kOutputs>{arguments});
    });
  });
}

int lattice(const LatticeArguments& arguments, bool inverse, int64_t numel, int32_t* status,
            void* stream) {
  const auto launch = [&](const auto& op) {
    return launch_elementwise(op, vectors(arguments), numel, arguments.per_row, status,
                              static_cast<cudaStream_t>(stream));
  };
  return with_outputs<false>(arguments.m1, arguments.m2, [&](auto output, auto count) {
    using M = decltype(output);
    constexpr int kOutputs = decltype(count)::value;
    if (arguments.buffer != nullptr) {
      return inverse ? launch(LatticeScaled<M, true, kOutputs>{arguments})
                     : launch(LatticeScaled<M, false, kOutputs>{arguments});
    }
    return inverse ? launch(Lattice<M, true, kOutputs>{arguments})
                   : launch(Lattice<M, false, kOutputs>{arguments});
  });
}

int encode(const EncodeArguments& arguments, int64_t numel, int32_t* status, void* stream) {
  return with_type<true>(arguments.x.dtype, [&](auto state) {
    return launch_elementwise(Encode<decltype(state)>{arguments},
                              aligned(arguments.x.data) && aligned(arguments.out), numel,
                              arguments.per_row, status, static_cast<cudaStream_t>(stream));
  });
}

int decode(const DecodeArguments& arguments, void* stream) {
  return with_type<true>(arguments.out.dtype, [&](auto state) {
    using T = decltype(state);
    // The second copy begins numel elements behind the first.
    const bool whole = aligned(arguments.z) && aligned(arguments.out.data) &&
                       (arguments.copies == 1 || arguments.numel * sizeof(T) % 16 == 0);
    return launch_elementwise(Decode<T>{arguments}, whole, arguments.numel, arguments.per_row,
                              nullptr, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace cuda
}  // namespace inpo_fast
