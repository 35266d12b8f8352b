// SPDX-License-Identifier: Apache-2.0
// Tiles: a few hundred elements that fit the first-level cache, converted to the type that the
// kernels compute in. So no kernel is written, or compiled, for a 16-bit type.

#include "arithmetic.inl"

namespace inpo_fast {
namespace INPO_TARGET {

constexpr int64_t kTile = 256;

inline float bfloat16_to_float(uint16_t h) { return bits_as<float>(uint32_t{h} << 16); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// The portable conversions of float16 have no branch, so that they vectorise, and use no denormal
// float32, so that they do not depend on the flush-to-zero mode.
inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const float denormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  bits = magnitude < 0x0400u ? bits_as<uint32_t>(denormal) : bits;
  bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits;
  return bits_as<float>(bits | (uint32_t{h} & 0x8000u) << 16);
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // A unit in the last place of 0.5f is the smallest float16, so the addition rounds to it.
  const uint32_t denormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t h = magnitude < 0x38800000u ? denormal : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  return static_cast<uint16_t>(h | (bits >> 16 & 0x8000u));
}

[[gnu::noinline]] inline void convert(const uint16_t* __restrict from, ScalarType dtype, int64_t n,
                                      float* __restrict to) {
  int64_t i = 0;
  if (dtype == ScalarType::BFloat16) {
    for (; i < n; ++i) to[i] = bfloat16_to_float(from[i]);
    return;
  }
#ifdef INPO_AVX2
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
#endif
  for (; i < n; ++i) to[i] = half_to_float(from[i]);
}

[[gnu::noinline]] inline void convert(const float* __restrict from, ScalarType dtype, int64_t n,
                                      uint16_t* __restrict to) {
  int64_t i = 0;
  if (dtype == ScalarType::BFloat16) {
    for (; i < n; ++i) to[i] = float_to_bfloat16(from[i]);
    return;
  }
#ifdef INPO_AVX2
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
#endif
  for (; i < n; ++i) to[i] = float_to_half(from[i]);
}

// Elements [begin, begin + n) of the source in float: in place if they are float, or in scratch.
inline const float* load_tile(const Source& source, int64_t begin, int64_t n, float* scratch) {
  if (source.data == nullptr) return nullptr;
  if (source.dtype == ScalarType::Float) return static_cast<const float*>(source.data) + begin;
  convert(static_cast<const uint16_t*>(source.data) + begin, source.dtype, n, scratch);
  return scratch;
}

// The same in double.
inline const double* load_tile(const Source& source, int64_t begin, int64_t n, double* scratch) {
  if (source.dtype == ScalarType::Double && source.data != nullptr) {
    return static_cast<const double*>(source.data) + begin;
  }
  alignas(64) float narrow[kTile];
  const float* values = load_tile(source, begin, n, narrow);
  if (values == nullptr) return nullptr;
  for (int64_t i = 0; i < n; ++i) scratch[i] = values[i];
  return scratch;
}

// True if an exponent has all bits set: NaN or infinity.
template <class T, class Bits>
inline bool any_nonfinite(const T* values, int64_t n, Bits exponent) {
  Bits found = 0;
  for (int64_t i = 0; i < n; ++i) {
    found |= (bits_as<Bits>(values[i]) & exponent) == exponent ? Bits{1} : Bits{0};
  }
  return found != 0;
}

// Where to compute elements [begin, begin + n) of the result: in place if it has the type, or in
// scratch.
inline float* target_tile(const Sink& sink, int64_t begin, float* scratch) {
  return sink.dtype == ScalarType::Float ? static_cast<float*>(sink.data) + begin : scratch;
}

inline double* target_tile(const Sink& sink, int64_t begin, double*) {
  return static_cast<double*>(sink.data) + begin;
}

// Brings the values of a target_tile to their place and says whether one is NaN or infinite there.
inline bool store_tile(const float* values, const Sink& sink, int64_t begin, int64_t n) {
  if (sink.dtype == ScalarType::Half || sink.dtype == ScalarType::BFloat16) {
    uint16_t* to = static_cast<uint16_t*>(sink.data) + begin;
    convert(values, sink.dtype, n, to);
    const bool half = sink.dtype == ScalarType::Half;
    return any_nonfinite(to, n, half ? uint16_t{0x7c00} : uint16_t{0x7f80});
  }
  if (sink.dtype == ScalarType::Double) {
    double* to = static_cast<double*>(sink.data) + begin;
    for (int64_t i = 0; i < n; ++i) to[i] = values[i];
  }
  return any_nonfinite(values, n, uint32_t{0x7f800000});
}

inline bool store_tile(const double* values, const Sink&, int64_t, int64_t n) {
  return any_nonfinite(values, n, uint64_t{0x7ff0000000000000});
}

// Walks through [begin, end) in tiles that do not cross from one row to the next.
struct Tile {
  int64_t begin, end, per_row;
  int64_t row = 0, size = 0;

  Tile(int64_t begin, int64_t end, int64_t per_row) : begin(begin), end(end), per_row(per_row) {
    if (begin < end) row = begin / per_row;
    fit();
  }

  bool valid() const { return begin < end; }

  void advance() {
    begin += size;
    if (begin == (row + 1) * per_row) ++row;
    fit();
  }

 private:
  void fit() {
    const int64_t row_end = (row + 1) * per_row;
    const int64_t stop = row_end < end ? row_end : end;
    size = stop - begin < kTile ? stop - begin : kTile;
  }
};

}  // namespace INPO_TARGET
}  // namespace inpo_fast
