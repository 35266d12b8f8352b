// SPDX-License-Identifier: Apache-2.0
// Kernels of the preference errors and their backward. Included by foreach_target.h.

#include "tile.inl"

namespace inpo_fast {
namespace INPO_TARGET {

// Sums in a fixed number of lanes, so that their order is that of no instruction set.
constexpr int64_t kLanes = 8;

template <class T>
inline double sum_of_squares(const T* __restrict first, const T* __restrict second, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const double residual = static_cast<double>(first[i + j] - second[i + j]);
      lanes[j] += residual * residual;
    }
  }
  for (int64_t j = 0; i + j < n; ++j) {
    const double residual = static_cast<double>(first[i + j] - second[i + j]);
    lanes[j] += residual * residual;
  }
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
         ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// Partial sums of blocks [begin, end): a block is a fixed part of one sample.
template <class T>
inline void errors_range(const ErrorArguments& arguments, int64_t begin, int64_t end) {
  alignas(64) T scratch[3][kTile];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t sample = block / arguments.blocks;
    const int64_t start = (block % arguments.blocks) * kBlock;
    const int64_t left = arguments.per_sample - start;
    const int64_t first = sample * arguments.per_sample + start;
    double e_theta = 0.0, e_ref = 0.0, d = 0.0;
    for (Tile tile(first, first + (left < kBlock ? left : kBlock), arguments.numel); tile.valid();
         tile.advance()) {
      const int64_t n = tile.size;
      const T* theta = load_tile(arguments.theta, tile.begin, n, scratch[0]);
      const T* ref = load_tile(arguments.ref, tile.begin, n, scratch[1]);
      const T* target = load_tile(arguments.target, tile.begin, n, scratch[2]);
      e_theta += sum_of_squares(theta, target, n);
      if (ref == nullptr) continue;
      e_ref += sum_of_squares(ref, target, n);
      d += sum_of_squares(theta, ref, n);
    }
    double* sums = arguments.sums + 3 * block;
    sums[0] = e_theta;
    sums[1] = e_ref;
    sums[2] = d;
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
  alignas(64) T out[kTile];
  for (Tile tile(begin, end, arguments.per_sample); tile.valid(); tile.advance()) {
    const int64_t n = tile.size;
    const T* theta = load_tile(arguments.theta, tile.begin, n, scratch[0]);
    const T* ref = load_tile(arguments.ref, tile.begin, n, scratch[1]);
    const T* target = load_tile(arguments.target, tile.begin, n, scratch[2]);
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
