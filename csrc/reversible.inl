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

// A double of the size of kRounder has no bits below 1, so the addition rounds, half to even.
// Beyond 2^51 more is rounded away, but such a value is far outside the lattice and stays so.
inline double round_to_even(double value) {
  constexpr double kRounder = 0x1.8p52;
  return (value + kRounder) - kRounder;
}

// rint(value * unit), half to even; 0 if the value is not finite.
inline double quantize(double value, double unit, int64_t& nonfinite) {
  const bool finite = __builtin_fabs(value) <= __DBL_MAX__;
  nonfinite |= finite ? 0 : 1;
  double scaled = value * unit;
  scaled = finite ? scaled : 0.0;
  return round_to_even(scaled);
}

// The value, which is not NaN, clamped. Written so that it is one instruction.
inline double clamp(double value, double low, double high) {
  const double above = value > low ? value : low;
  return above < high ? above : high;
}

// The value in int32, saturated.
inline int32_t saturate(double value, int64_t& out_of_range) {
  const double inside = clamp(value, -2147483648.0, 2147483647.0);
  out_of_range |= inside == value ? 0 : 1;
  return static_cast<int32_t>(inside);
}

inline int32_t status_bits(int64_t out_of_range, int64_t nonfinite) {
  return (out_of_range != 0 ? kStatusRange : 0) | (nonfinite != 0 ? kStatusNonfinite : 0);
}

template <int kOutputs>
inline void quantize_tile(const Coefficients& row, const LatticeUnit& unit,
                          const int32_t* __restrict y, const float* __restrict m1,
                          const float* __restrict m2, int64_t n, int64_t& nonfinite,
                          double* __restrict q) {
  int64_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float value = static_cast<float>(y[i]) * unit.resolution;
    q[i] = quantize(increment<kOutputs>(row, value, m1, m2, i), unit.inverse, bad);
  }
  nonfinite |= bad;
}

// The quantized increments of a tile, [n], in q.
inline void increment_tile(const LatticeArguments& arguments, const Tile& tile, int64_t& nonfinite,
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
inline void add_tile(const int32_t* z, const double* __restrict q, int64_t n, int64_t& out_of_range,
                     int32_t* out) {
  int64_t bad = 0;
  // In place, z is out.
  INPO_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const double value = static_cast<double>(z[i]);
    out[i] = saturate(kInverse ? value - q[i] : value + q[i], bad);
  }
  out_of_range |= bad;
}

template <bool kInverse>
int32_t lattice(const LatticeArguments& arguments, int64_t begin, int64_t end) {
  alignas(64) double q[kTile];
  int64_t out_of_range = 0, nonfinite = 0;
  for (Tile tile(begin, end, arguments.per_row); tile.valid(); tile.advance()) {
    increment_tile(arguments, tile, nonfinite, q);
    add_tile<kInverse>(arguments.z + tile.begin, q, tile.size, out_of_range,
                       arguments.out + tile.begin);
  }
  return status_bits(out_of_range, nonfinite);
}

// floor(x / v) and what remains, for |x| <= 2^51. The rounded quotient is right or one too large,
// and all operands are exact.
inline double divide(double x, const Divisor& v, double& remainder) {
  const double quotient = round_to_even(x * v.inverse);
  const double rest = x - quotient * v.value;
  const bool large = rest < 0.0;
  remainder = large ? rest + v.value : rest;
  return large ? quotient - 1.0 : quotient;
}

// An integer below 2^52 to double and back, by the bits behind the exponent of 2^52.
inline double to_double(uint64_t x) {
  return bits_as<double>(x | uint64_t{0x4330000000000000}) - 0x1p52;
}
inline uint64_t to_bits(double x) { return bits_as<uint64_t>(x + 0x1p52); }

// Integers of up to 62 bits as two parts, high * 2^32 + low: unlike a 64-bit division, or the high
// half of a product, arithmetic on these vectorises.
struct Halves {
  double high, low;
};

// buffer / v and what remains.
inline Halves divide_buffer(uint64_t buffer, const Divisor& v, double& remainder) {
  Halves quotient;
  quotient.high = divide(to_double(buffer >> 32), v, remainder);
  const double low = remainder * 0x1p32 + to_double(buffer & 0xffffffffu);
  quotient.low = divide(low, v, remainder);
  return quotient;
}

// x * v + digit.
inline uint64_t join_buffer(const Halves& x, const Divisor& v, double digit) {
  return (to_bits(x.high * v.value) << 32) + (to_bits(x.low * v.value + digit) & 0xfffffffffffffu);
}

// Scales (z, buffer) by p/q <= 1 and returns the new z. |z| <= 2^34; inpo_fast/lattice.py has the
// equations.
inline double contract(double z, uint64_t& buffer, const Divisor& p, const Divisor& q) {
  double digit, rest;
  const Halves high = divide_buffer(buffer, p, digit);
  const double quotient = divide(z * p.value, q, rest);
  const double gap = rest == 0.0 ? 0.0 : q.value - rest;
  digit += gap < p.value ? gap : 0.0;
  digit -= digit >= p.value ? p.value : 0.0;
  rest += digit;
  const bool carry = rest >= q.value;
  buffer = join_buffer(high, q, carry ? rest - q.value : rest);
  return carry ? quotient + 1.0 : quotient;
}

// Scales (z, buffer) by q/p >= 1: the inverse of contract.
inline double expand(double z, uint64_t& buffer, const Divisor& p, const Divisor& q) {
  double digit, rest;
  const Halves high = divide_buffer(buffer, q, digit);
  const double quotient = divide(z * q.value + digit, p, rest);
  double gap = rest - digit;
  gap += gap < 0.0 ? q.value : 0.0;
  digit = rest - (gap < p.value ? gap : 0.0);
  digit += digit < 0.0 ? p.value : 0.0;
  buffer = join_buffer(high, p, digit);
  return quotient;
}

// One tile, scaled by n/d; kContract says that n <= d.
template <bool kInverse, bool kContract>
inline void scaled_tile(const Divisor& n, const Divisor& d, const int32_t* z, const int64_t* buffer,
                        const double* q, int64_t size, int64_t& out_of_range, int32_t* out,
                        int64_t* buffer_out) {
  int64_t bad = 0;
  // In place, z is out and buffer is buffer_out: element by element, so nothing is carried.
  INPO_INDEPENDENT
  for (int64_t i = 0; i < size; ++i) {
    uint64_t kept = static_cast<uint64_t>(buffer[i]);
    const double delta = clamp(q[i], -kIncrementBound, kIncrementBound);
    double value = static_cast<double>(z[i]);
    if (kInverse) {
      const double whole = value - delta;
      value = clamp(whole, -kScaledBound, kScaledBound);
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
  int64_t out_of_range = 0, nonfinite = 0;
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
                        int64_t& out_of_range, int64_t& nonfinite, int32_t* __restrict out) {
  int64_t outside = 0, bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = saturate(quantize(static_cast<double>(x[i]) * scale, unit, bad), outside);
  }
  out_of_range |= outside;
  nonfinite |= bad;
}

template <class T>
int32_t encode_range(const EncodeArguments& arguments, int64_t begin, int64_t end) {
  alignas(64) T scratch[kTile];
  int64_t out_of_range = 0, nonfinite = 0;
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
