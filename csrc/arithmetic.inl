// SPDX-License-Identifier: Apache-2.0
// The arithmetic of one element, the same on every device and instruction set: included once for
// each, in a namespace of its own. Compilers must not contract it to fused multiply-adds.

namespace inpo_fast {
namespace INPO_TARGET {

// As wide as what it is found beside in a vector register of a CPU.
#ifdef __CUDACC__
using Flag = int32_t;
#else
using Flag = int64_t;
#endif

constexpr double kLargest = 0x1.fffffffffffffp1023;

template <class To, class From>
INPO_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Conversions of integers below 2^51. A GPU has few units for them: there it is the bits of a
// double of the size of kRounder that are the integer.
constexpr double kRounder = 0x1.8p52;

INPO_INLINE double from_int32(int32_t x) {
#ifdef __CUDA_ARCH__
  const uint64_t low = static_cast<uint32_t>(x) ^ 0x80000000u;
  return bits_as<double>(low | uint64_t{0x4330000000000000}) - (0x1p52 + 0x1p31);
#else
  return static_cast<double>(x);
#endif
}

INPO_INLINE int32_t to_int32(double x) {
#ifdef __CUDA_ARCH__
  return static_cast<int32_t>(bits_as<uint64_t>(x + kRounder));
#else
  return static_cast<int32_t>(x);
#endif
}

// A double of the size of kRounder has no bits below 1, so the addition rounds, half to even.
// Beyond 2^51 more is rounded away, but such a value is far outside the lattice and stays so.
INPO_INLINE double round_to_even(double value) { return (value + kRounder) - kRounder; }

// rint(value * unit), half to even; 0 if the value is not finite.
INPO_INLINE double quantize(double value, double unit, Flag& nonfinite) {
  const bool finite = value >= -kLargest && value <= kLargest;
  nonfinite |= finite ? 0 : 1;
  double scaled = value * unit;
  scaled = finite ? scaled : 0.0;
  return round_to_even(scaled);
}

// The value, which is not NaN, clamped. Written so that it is one instruction.
INPO_INLINE double clamp(double value, double low, double high) {
  const double above = value > low ? value : low;
  return above < high ? above : high;
}

// The value in int32, saturated.
INPO_INLINE int32_t saturate(double value, Flag& out_of_range) {
#ifdef __CUDA_ARCH__
  const int32_t low = to_int32(value);
  const bool inside = from_int32(low) == value;
  out_of_range |= inside ? 0 : 1;
  return inside ? low : value < 0.0 ? INT32_MIN : INT32_MAX;
#else
  const double inside = clamp(value, -2147483648.0, 2147483647.0);
  out_of_range |= inside == value ? 0 : 1;
  return to_int32(inside);
#endif
}

INPO_INLINE int32_t status_bits(Flag out_of_range, Flag nonfinite) {
  return (out_of_range != 0 ? kStatusRange : 0) | (nonfinite != 0 ? kStatusNonfinite : 0);
}

// floor(x / v) and what remains, for |x| <= 2^51. The rounded quotient is right or one too large,
// and all operands are exact.
INPO_INLINE double divide(double x, const Divisor& v, double& remainder) {
  const double quotient = round_to_even(x * v.inverse);
  const double rest = x - quotient * v.value;
  const bool large = rest < 0.0;
  remainder = large ? rest + v.value : rest;
  return large ? quotient - 1.0 : quotient;
}

// An integer below 2^52 to double and back, by the bits behind the exponent of 2^52.
INPO_INLINE double to_double(uint64_t x) {
  return bits_as<double>(x | uint64_t{0x4330000000000000}) - 0x1p52;
}
INPO_INLINE uint64_t to_bits(double x) { return bits_as<uint64_t>(x + 0x1p52); }

// Integers of up to 62 bits as two parts, high * 2^32 + low: unlike a 64-bit division, or the high
// half of a product, arithmetic on these vectorises.
struct Halves {
  double high, low;
};

// buffer / v and what remains. kSmall: the buffer is below 2^32, where the high half is none.
template <bool kSmall>
INPO_INLINE Halves divide_buffer(uint64_t buffer, const Divisor& v, double& remainder) {
  Halves quotient;
  if constexpr (kSmall) {
    quotient.high = 0.0;
    quotient.low = divide(to_double(buffer), v, remainder);
    return quotient;
  }
  quotient.high = divide(to_double(buffer >> 32), v, remainder);
  const double low = remainder * 0x1p32 + to_double(buffer & 0xffffffffu);
  quotient.low = divide(low, v, remainder);
  return quotient;
}

// x * v + digit.
template <bool kSmall>
INPO_INLINE uint64_t join_buffer(const Halves& x, const Divisor& v, double digit) {
  const uint64_t low = to_bits(x.low * v.value + digit) & 0xfffffffffffffu;
  return kSmall ? low : (to_bits(x.high * v.value) << 32) + low;
}

// How far from 0 what an inverse scales by n/d may be: kScaledBound, times floor(d/n) if that is
// more. For n and d up to 2^16 their quotient is an integer or 2^-16 away from one.
INPO_INLINE double scaled_bound(const Divisor& n, const Divisor& d) {
  const double times = from_int32(static_cast<int32_t>(d.value * n.inverse + 0x1p-18));
  return kScaledBound * (times > 1.0 ? times : 1.0);
}

// Scales (z, buffer) by p/q <= 1 and returns the new z. |z| p <= 2^34 q; inpo_fast/lattice.py has
// the equations.
template <bool kSmall = false>
INPO_INLINE double contract(double z, uint64_t& buffer, const Divisor& p, const Divisor& q) {
  double digit, rest;
  const Halves high = divide_buffer<kSmall>(buffer, p, digit);
  const double quotient = divide(z * p.value, q, rest);
  const double gap = rest == 0.0 ? 0.0 : q.value - rest;
  digit += gap < p.value ? gap : 0.0;
  digit -= digit >= p.value ? p.value : 0.0;
  rest += digit;
  const bool carry = rest >= q.value;
  buffer = join_buffer<kSmall>(high, q, carry ? rest - q.value : rest);
  return carry ? quotient + 1.0 : quotient;
}

// Scales (z, buffer) by q/p >= 1, |z| <= 2^34: the inverse of contract.
template <bool kSmall = false>
INPO_INLINE double expand(double z, uint64_t& buffer, const Divisor& p, const Divisor& q) {
  double digit, rest;
  const Halves high = divide_buffer<kSmall>(buffer, q, digit);
  const double quotient = divide(z * q.value + digit, p, rest);
  double gap = rest - digit;
  gap += gap < 0.0 ? q.value : 0.0;
  digit = rest - (gap < p.value ? gap : 0.0);
  digit += digit < 0.0 ? p.value : 0.0;
  buffer = join_buffer<kSmall>(high, p, digit);
  return quotient;
}

}  // namespace INPO_TARGET
}  // namespace inpo_fast
