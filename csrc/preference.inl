// SPDX-License-Identifier: Apache-2.0
// Kernels of the preference errors and their backward. Included by foreach_target.h.

#include "tile.inl"

namespace inpo_fast {
namespace INPO_TARGET {

// Element i of every tile adds to lane i, and a fixed tree adds the lanes. So the order of a sum is
// that of no instruction set, and the loops have no chain of additions.
struct Lanes {
  alignas(64) double e_theta[kTile], e_ref[kTile], d[kTile];
};

template <class T>
inline double square(T residual) {
  return static_cast<double>(residual) * static_cast<double>(residual);
}

template <class T>
inline void add_tile(const T* __restrict theta, const T* __restrict ref, const T* __restrict target,
                     int64_t n, Lanes& __restrict lanes) {
  if (ref == nullptr) {
    for (int64_t i = 0; i < n; ++i) lanes.e_theta[i] += square(theta[i] - target[i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    lanes.e_theta[i] += square(theta[i] - target[i]);
    lanes.e_ref[i] += square(ref[i] - target[i]);
    lanes.d[i] += square(theta[i] - ref[i]);
  }
}

inline double total(double* lanes, int64_t width) {
  for (int64_t half = width / 2; half > 0; half /= 2) {
    INPO_INDEPENDENT
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Sums of blocks [begin, end): a block is a fixed part of one sample.
template <class T>
inline void errors_range(const ErrorArguments& arguments, int64_t begin, int64_t end) {
  alignas(64) T scratch[3][kTile];
  Lanes lanes;
  // Lanes in use: a power of two.
  int64_t width = 1;
  while (width < arguments.per_sample && width < kTile) width *= 2;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t sample = block / arguments.blocks;
    const int64_t start = (block % arguments.blocks) * kBlock;
    const int64_t left = arguments.per_sample - start;
    const int64_t first = sample * arguments.per_sample + start;
    const int64_t last = first + (left < kBlock ? left : kBlock);
    __builtin_memset(lanes.e_theta, 0, width * sizeof(double));
    __builtin_memset(lanes.e_ref, 0, width * sizeof(double));
    __builtin_memset(lanes.d, 0, width * sizeof(double));
    for (Tile tile(first, last, arguments.numel); tile.valid(); tile.advance()) {
      const int64_t n = tile.size;
      const T* theta = load_tile(arguments.theta, tile.begin, n, scratch[0]);
      const T* ref = load_tile(arguments.ref, tile.begin, n, scratch[1]);
      const T* target = load_tile(arguments.target, tile.begin, n, scratch[2]);
      add_tile(theta, ref, target, n, lanes);
    }
    double* out = arguments.sums + 3 * block;
    out[0] = total(lanes.e_theta, width);
    out[1] = total(lanes.e_ref, width);
    out[2] = total(lanes.d, width);
  }
}

int32_t errors(const ErrorArguments& arguments, int64_t begin, int64_t end) {
  if (arguments.theta.dtype == ScalarType::Double) {
    errors_range<double>(arguments, begin, end);
  } else {
    errors_range<float>(arguments, begin, end);
  }
  return 0;
}

template <class T>
inline void backward_tile(double a, double b, const T* __restrict theta, const T* __restrict ref,
                          const T* __restrict target, int64_t n, T* __restrict out) {
  if (ref == nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = static_cast<T>(a * static_cast<double>(theta[i] - target[i]));
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double from_target = a * static_cast<double>(theta[i] - target[i]);
    out[i] = static_cast<T>(from_target + b * static_cast<double>(theta[i] - ref[i]));
  }
}

template <class T>
inline void backward_range(const BackwardArguments& arguments, int64_t begin, int64_t end) {
  alignas(64) T scratch[3][kTile];
  alignas(64) T result[kTile];
  for (Tile tile(begin, end, arguments.per_sample); tile.valid(); tile.advance()) {
    const int64_t n = tile.size;
    const T* theta = load_tile(arguments.theta, tile.begin, n, scratch[0]);
    const T* ref = load_tile(arguments.ref, tile.begin, n, scratch[1]);
    const T* target = load_tile(arguments.target, tile.begin, n, scratch[2]);
    T* out = target_tile(arguments.out, tile.begin, result);
    backward_tile(arguments.a.at(tile.row, 0), arguments.b.at(tile.row, 0), theta, ref, target, n,
                  out);
    store_tile(out, arguments.out, tile.begin, n);
  }
}

int32_t backward(const BackwardArguments& arguments, int64_t begin, int64_t end) {
  if (arguments.out.dtype == ScalarType::Double) {
    backward_range<double>(arguments, begin, end);
  } else {
    backward_range<float>(arguments, begin, end);
  }
  return 0;
}

}  // namespace INPO_TARGET
}  // namespace inpo_fast
