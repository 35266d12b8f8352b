// SPDX-License-Identifier: Apache-2.0
// Kernels of the reversible update on elements [begin, end). Included by foreach_target.h.

#include "tile.inl"

namespace inpo_fast {
namespace INPO_TARGET {

// (b*y + c1*m1) + c2*m2 in double, for the number of model outputs that there is.
template <int kOutputs, class T>
inline double increment(const Coefficients& row, T y, const T* m1, const T* m2, int64_t i) {
  double total = row.b * static_cast<double>(y);
  if constexpr (kOutputs > 0) total = total + row.c1 * static_cast<double>(m1[i]);
  if constexpr (kOutputs > 1) total = total + row.c2 * static_cast<double>(m2[i]);
  return total;
}

// --- Float states ---

template <class T, bool kInverse, int kOutputs>
inline void affine_tile(const Coefficients& row, const T* x, const T* y, const T* m1, const T* m2,
                        int64_t n, T* out) {
  // In place, x is out.
  INPO_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const double delta = increment<kOutputs>(row, y[i], m1, m2, i);
    const double value = static_cast<double>(x[i]);
    out[i] = static_cast<T>(kInverse ? (value - delta) / row.a : row.a * value + delta);
  }
}

template <class T, bool kInverse>
int32_t affine_range(const AffineArguments& arguments, int64_t begin, int64_t end) {
  alignas(64) T scratch[4][kTile];
  alignas(64) T result[kTile];
  bool nonfinite = false;
  for (Tile tile(begin, end, arguments.per_row); tile.valid(); tile.advance()) {
    const Coefficients row(arguments.coef, tile.row);
    const int64_t n = tile.size;
    const T* x = load_tile(arguments.x, tile.begin, n, scratch[0]);
    const T* y = load_tile(arguments.y, tile.begin, n, scratch[1]);
    const T* m1 = load_tile(arguments.m1, tile.begin, n, scratch[2]);
    const T* m2 = load_tile(arguments.m2, tile.begin, n, scratch[3]);
    T* out = target_tile(arguments.out, tile.begin, result);
    if (m2 != nullptr) {
      affine_tile<T, kInverse, 2>(row, x, y, m1, m2, n, out);
    } else if (m1 != nullptr) {
      affine_tile<T, kInverse, 1>(row, x, y, m1, m2, n, out);
    } else {
      affine_tile<T, kInverse, 0>(row, x, y, m1, m2, n, out);
    }
    nonfinite |= store_tile(out, arguments.out, tile.begin, n);
  }
  return nonfinite ? kStatusNonfinite : 0;
}

template <bool kInverse>
int32_t affine(const AffineArguments& arguments, int64_t begin, int64_t end) {
  return arguments.out.dtype == ScalarType::Double
             ? affine_range<double, kInverse>(arguments, begin, end)
             : affine_range<float, kInverse>(arguments, begin, end);
}

// --- Lattice states ---

template <int kOutputs>
inline void quantize_tile(const Coefficients& row, const LatticeUnit& unit,
                          const int32_t* __restrict y, const float* __restrict m1,
                          const float* __restrict m2, int64_t n, Flag& nonfinite,
                          double* __restrict q) {
  Flag bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float value = static_cast<float>(y[i]) * unit.resolution;
    q[i] = quantize(increment<kOutputs>(row, value, m1, m2, i), unit.inverse, bad);
  }
  nonfinite |= bad;
}

// The quantized increments of a tile, [n], in q.
inline void increment_tile(const LatticeArguments& arguments, const Tile& tile, Flag& nonfinite,
                           double* q) {
  alignas(64) float scratch[2][kTile];
  const Coefficients row(arguments.coef, tile.row);
  const int64_t n = tile.size;
  const int32_t* y = arguments.y + tile.begin;
  const float* m1 = load_tile(arguments.m1, tile.begin, n, scratch[0]);
  const float* m2 = load_tile(arguments.m2, tile.begin, n, scratch[1]);
  if (m2 != nullptr) {
    quantize_tile<2>(row, arguments.unit, y, m1, m2, n, nonfinite, q);
  } else if (m1 != nullptr) {
    quantize_tile<1>(row, arguments.unit, y, m1, m2, n, nonfinite, q);
  } else {
    quantize_tile<0>(row, arguments.unit, y, m1, m2, n, nonfinite, q);
  }
}

template <bool kInverse>
inline void add_tile(const int32_t* z, const double* __restrict q, int64_t n, Flag& out_of_range,
                     int32_t* out) {
  Flag bad = 0;
  // In place, z is out.
  INPO_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const double value = from_int32(z[i]);
    out[i] = saturate(kInverse ? value - q[i] : value + q[i], bad);
  }
  out_of_range |= bad;
}

template <bool kInverse>
int32_t lattice(const LatticeArguments& arguments, int64_t begin, int64_t end) {
  alignas(64) double q[kTile];
  Flag out_of_range = 0, nonfinite = 0;
  for (Tile tile(begin, end, arguments.per_row); tile.valid(); tile.advance()) {
    increment_tile(arguments, tile, nonfinite, q);
    add_tile<kInverse>(arguments.z + tile.begin, q, tile.size, out_of_range,
                       arguments.out + tile.begin);
  }
  return status_bits(out_of_range, nonfinite);
}

// One tile, scaled by n/d; kContract says that n <= d.
template <bool kInverse, bool kContract>
inline void scaled_tile(const Divisor& n, const Divisor& d, const int32_t* z, const int64_t* buffer,
                        const double* q, int64_t size, Flag& out_of_range, int32_t* out,
                        int64_t* buffer_out) {
  Flag bad = 0;
  const double bound = scaled_bound(n, d);
  // In place, z is out and buffer is buffer_out: element by element, so nothing is carried.
  INPO_INDEPENDENT
  for (int64_t i = 0; i < size; ++i) {
    uint64_t kept = static_cast<uint64_t>(buffer[i]);
    const double delta = clamp(q[i], -kIncrementBound, kIncrementBound);
    double value = from_int32(z[i]);
    if (kInverse) {
      const double whole = value - delta;
      value = clamp(whole, -bound, bound);
      bad |= value == whole ? 0 : 1;
    }
    const double scaled = kContract ? contract(value, kept, n, d) : expand(value, kept, d, n);
    buffer_out[i] = static_cast<int64_t>(kept);
    out[i] = saturate(kInverse ? scaled : scaled + delta, bad);
  }
  out_of_range |= bad;
}

template <bool kInverse>
int32_t lattice_scaled(const LatticeArguments& arguments, int64_t begin, int64_t end) {
  alignas(64) double q[kTile];
  Flag out_of_range = 0, nonfinite = 0;
  for (Tile tile(begin, end, arguments.per_row); tile.valid(); tile.advance()) {
    increment_tile(arguments, tile, nonfinite, q);
    const int64_t* ratio = arguments.ratio + (arguments.ratio_by_sample ? 4 * tile.row : 0);
    // The inverse scales by the exchanged ratio.
    const Divisor n(ratio[kInverse ? 1 : 0]), d(ratio[kInverse ? 0 : 1]);
    const auto run =
        n.value <= d.value ? scaled_tile<kInverse, true> : scaled_tile<kInverse, false>;
    run(n, d, arguments.z + tile.begin, arguments.buffer + tile.begin, q, tile.size, out_of_range,
        arguments.out + tile.begin, arguments.buffer_out + tile.begin);
  }
  return status_bits(out_of_range, nonfinite);
}

// --- Into and out of the lattice ---

template <class T>
inline void encode_tile(const T* __restrict x, double scale, double unit, int64_t n,
                        Flag& out_of_range, Flag& nonfinite, int32_t* __restrict out) {
  Flag outside = 0, bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = saturate(quantize(static_cast<double>(x[i]) * scale, unit, bad), outside);
  }
  out_of_range |= outside;
  nonfinite |= bad;
}

template <class T>
int32_t encode_range(const EncodeArguments& arguments, int64_t begin, int64_t end) {
  alignas(64) T scratch[kTile];
  Flag out_of_range = 0, nonfinite = 0;
  for (Tile tile(begin, end, arguments.per_row); tile.valid(); tile.advance()) {
    const T* x = load_tile(arguments.x, tile.begin, tile.size, scratch);
    encode_tile(x, arguments.scale.at(tile.row, 0), arguments.unit.inverse, tile.size, out_of_range,
                nonfinite, arguments.out + tile.begin);
  }
  return status_bits(out_of_range, nonfinite);
}

int32_t encode(const EncodeArguments& arguments, int64_t begin, int64_t end) {
  return arguments.x.dtype == ScalarType::Double ? encode_range<double>(arguments, begin, end)
                                                 : encode_range<float>(arguments, begin, end);
}

inline void decode_tile(const int32_t* __restrict z, double scale, float resolution, int64_t n,
                        float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = static_cast<float>(z[i]) * resolution;
    out[i] = static_cast<float>(static_cast<double>(value) * scale);
  }
}

int32_t decode(const DecodeArguments& arguments, int64_t begin, int64_t end) {
  alignas(64) float result[kTile];
  for (Tile tile(begin, end, arguments.per_row); tile.valid(); tile.advance()) {
    for (int64_t copy = 0; copy < arguments.copies; ++copy) {
      const int64_t place = tile.begin + copy * arguments.numel;
      float* out = target_tile(arguments.out, place, result);
      decode_tile(arguments.z + tile.begin, arguments.scale.at(tile.row, 0),
                  arguments.unit.resolution, tile.size, out);
      store_tile(out, arguments.out, place, tile.size);
    }
  }
  return 0;
}

}  // namespace INPO_TARGET
}  // namespace inpo_fast
