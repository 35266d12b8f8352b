// SPDX-License-Identifier: Apache-2.0
// What kernels are given, on every device. Nothing here knows a tensor.
#pragma once

// The oldest torch to run with. Defined here and not for the whole build, because torch's own copy
// of pybind11 refuses to be included beside it.
#define TORCH_TARGET_VERSION INPO_FAST_TORCH_TARGET

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#ifdef __CUDACC__
#define INPO_INLINE __host__ __device__ __forceinline__
#else
#define INPO_INLINE inline
#endif

namespace inpo_fast {

using torch::headeronly::ScalarType;

// Bits of a status word.
constexpr int32_t kStatusRange = 1;
constexpr int32_t kStatusNonfinite = 2;

constexpr double kIncrementBound = 0x1p50;
constexpr double kScaledBound = 0x1p34;

// The elements of a tensor in memory order, or nothing (null) for an absent argument.
struct Source {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
};

struct Sink {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
};

// Constants, [width] for all samples or [B, width], float or double.
struct Rows {
  Source values;
  int64_t width = 1;
  bool by_sample = false;

  INPO_INLINE double at(int64_t sample, int64_t column) const {
    const int64_t index = (by_sample ? sample * width : 0) + column;
    return values.dtype == ScalarType::Double
               ? static_cast<const double*>(values.data)[index]
               : static_cast<double>(static_cast<const float*>(values.data)[index]);
  }
};

// One row (a, b, c1, c2).
struct Coefficients {
  double a, b, c1, c2;

  INPO_INLINE Coefficients(const Rows& rows, int64_t row)
      : a(rows.at(row, 0)), b(rows.at(row, 1)), c1(rows.at(row, 2)), c2(rows.at(row, 3)) {}
};

// A term of a scale n/d, 1 to 2^16.
struct Divisor {
  double value, inverse;

  INPO_INLINE explicit Divisor(int64_t v) : value(static_cast<double>(v)), inverse(1.0 / value) {}
};

// 2^-K and 2^K.
struct LatticeUnit {
  float resolution;
  double inverse;

  explicit LatticeUnit(int64_t frac_bits)
      : resolution(static_cast<float>(1.0 / static_cast<double>(int64_t{1} << frac_bits))),
        inverse(static_cast<double>(int64_t{1} << frac_bits)) {}
};

// per_row: elements that share a row of constants.
struct AffineArguments {
  Source x, y, m1, m2;
  Rows coef;
  int64_t per_row;
  Sink out;
};

// Without a buffer (null) the update is a plain addition.
struct LatticeArguments {
  const int32_t *z, *y;
  const int64_t* buffer;
  Source m1, m2;
  Rows coef;
  const int64_t* ratio;
  bool ratio_by_sample;
  int64_t per_row;
  LatticeUnit unit;
  int32_t* out;
  int64_t* buffer_out;
};

struct EncodeArguments {
  Source x;
  Rows scale;
  int64_t per_row;
  LatticeUnit unit;
  int32_t* out;
};

struct DecodeArguments {
  const int32_t* z;
  Rows scale;
  int64_t per_row;
  LatticeUnit unit;
  int64_t copies, numel;
  Sink out;
};

struct ErrorArguments {
  Source theta, ref, target;
  bool has_ref;                       // An empty tensor has no memory either.
  int64_t numel, per_sample, blocks;  // Blocks per sample.
  double* sums;                       // [B, blocks, 3]
};

struct BackwardArguments {
  Source theta, ref, target;
  Rows a, b;
  int64_t per_sample;
  Sink out;
};

// How many blocks of threads sum one sample on a GPU: enough to fill it, and a function of the
// shape alone, so that every GPU adds in the same order.
inline int64_t error_blocks(int64_t batch, int64_t per_sample) {
  constexpr int64_t kBlocks = 128, kLeast = 4096;
  const int64_t wanted = (kBlocks + batch - 1) / (batch > 0 ? batch : 1);
  const int64_t most = (per_sample + kLeast - 1) / kLeast;
  const int64_t blocks = wanted < most ? wanted : most;
  return blocks > 0 ? blocks : 1;
}

// Each launches on a stream and returns a CUDA error code; numel is what the operator works on.
namespace cuda {

int affine(const AffineArguments& arguments, bool inverse, int64_t numel, int32_t* status,
           void* stream);
int lattice(const LatticeArguments& arguments, bool inverse, int64_t numel, int32_t* status,
            void* stream);
int encode(const EncodeArguments& arguments, int64_t numel, int32_t* status, void* stream);
int decode(const DecodeArguments& arguments, void* stream);
// Means of B samples into three results, [B] each.
int errors(const ErrorArguments& arguments, int64_t batch, const Sink (&results)[3], void* stream);
int backward(const BackwardArguments& arguments, int64_t numel, void* stream);

}  // namespace cuda
}  // namespace inpo_fast
