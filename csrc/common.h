// SPDX-License-Identifier: Apache-2.0
// What every operator shares: dtypes, raw views of tensors, and the choice of one dense layout.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace inpo_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Bits of a status word.
constexpr int32_t kStatusRange = 1;
constexpr int32_t kStatusNonfinite = 2;

// Elements that one thread takes at least. Below it a second thread costs more than it gains.
constexpr int64_t kGrain = 32768;

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

  double at(int64_t sample, int64_t column) const {
    const int64_t index = (by_sample ? sample * width : 0) + column;
    return values.dtype == ScalarType::Double
               ? static_cast<const double*>(values.data)[index]
               : static_cast<double>(static_cast<const float*>(values.data)[index]);
  }
};

inline Source source(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type()}; }
inline Source source(const OptionalTensor& t) { return t ? source(*t) : Source{}; }
inline Sink sink(const Tensor& t) { return {t.mutable_data_ptr(), t.scalar_type()}; }

// The Python functions explain wrong arguments; these checks only keep a direct call from reading
// or writing outside a tensor.
inline void check_cpu(const Tensor& t) { STD_TORCH_CHECK(t.is_cpu(), "expected a CPU tensor"); }

inline void check_like(const Tensor& t, const Tensor& x) {
  check_cpu(t);
  const auto a = t.sizes(), b = x.sizes();
  STD_TORCH_CHECK(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()),
                  "expected tensors of one shape");
}

inline void check_dtype(const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "expected dtype ", torch::headeronly::toString(dtype));
}

inline bool is_16bit(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

inline void check_float(const Tensor& t, bool allow_double) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || is_16bit(dtype) ||
                      (allow_double && dtype == ScalarType::Double),
                  "unexpected dtype ", torch::headeronly::toString(dtype));
}

// Constants of shape [width] or [B, width] (width 1 also [] or [B]), made contiguous.
class Constants {
 public:
  Constants(const Tensor& t, const Tensor& x, int64_t width)
      : tensor_(t.is_contiguous() ? t : torch::stable::contiguous(t)) {
    check_cpu(t);
    const int64_t dim = t.dim();
    by_sample_ = dim == (width == 1 ? 1 : 2) && t.numel() != width;
    const int64_t rows = by_sample_ ? t.size(0) : 1;
    STD_TORCH_CHECK(t.numel() == rows * width, "constants must have ", width, " per row");
    STD_TORCH_CHECK(!by_sample_ || (x.dim() > 0 && rows == x.size(0)),
                    "constants must have one row, or one per sample");
  }

  bool by_sample() const { return by_sample_; }
  Rows rows(int64_t width) const { return {source(tensor_), width, by_sample_}; }
  const int64_t* int64_data() const {
    return static_cast<const int64_t*>(tensor_.const_data_ptr());
  }

 private:
  Tensor tensor_;
  bool by_sample_;
};

// Pointer to the status word, int32 [1].
inline int32_t* status_word(const Tensor& status) {
  check_cpu(status);
  check_dtype(status, ScalarType::Int);
  STD_TORCH_CHECK(status.numel() == 1, "status must have one element");
  return static_cast<int32_t*>(status.mutable_data_ptr());
}

// Threads may raise bits at the same time.
inline void raise(int32_t* status, int32_t bits) {
  if (status != nullptr && bits != 0) __atomic_fetch_or(status, bits, __ATOMIC_RELAXED);
}

// Runs kernel(arguments, begin, end) over [0, numel) and raises the bits that it returns.
template <class Arguments>
void parallel(int32_t (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments,
              int64_t numel, int32_t* status, int64_t grain = kGrain) {
  if (numel <= grain) return raise(status, kernel(arguments, 0, numel));
  torch::stable::parallel_for(0, numel, grain, [&](int64_t begin, int64_t end) {
    raise(status, kernel(arguments, begin, end));
  });
}

inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim,
                            ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, to<int32_t>(from(dtype)), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// True if the elements fill one block of memory, each once: then any order of dimensions is fine.
bool is_dense(const Tensor& t);

// Chooses one dense layout in which an elementwise operator reads and writes flat memory.
//
// It is the layout of the result, that of torch.empty_like(x), except where rows differ by sample
// and samples are not whole blocks of memory in it; then it is the contiguous layout.
class Layout {
 public:
  // x: [B, ...]. by_sample: samples must be whole blocks of memory.
  Layout(const Tensor& x, bool by_sample);

  int64_t numel() const { return numel_; }
  int64_t per_sample() const { return numel_ / std::max<int64_t>(dim_ > 0 ? sizes_[0] : 1, 1); }

  // t, [B, ...], or a copy of it in this layout.
  Tensor input(const Tensor& t) const;
  OptionalTensor input(const OptionalTensor& t) const;

  // New memory, [copies * B, ...], in this layout.
  Tensor output(ScalarType dtype, int64_t copies = 1) const;

  // The same to write x in place: x itself if it has this layout.
  Tensor target(const Tensor& x) const;

  // The result in the layout of torch.empty_like(x).
  Tensor finish(const Tensor& result) const;

  // Copies the result into x unless it is x.
  static void finish_into(Tensor x, const Tensor& result);

 private:
  bool matches(const Tensor& t) const;

  const Tensor& x_;
  int64_t numel_ = 0, dim_ = 0;
  const int64_t* sizes_ = nullptr;
  const int64_t* strides_ = nullptr;         // Of this layout.
  const int64_t* result_strides_ = nullptr;  // Of torch.empty_like(x).
  std::optional<Tensor> like_;               // Owns result_strides_ if x is not dense.
  std::vector<int64_t> contiguous_;          // Owns strides_ if this layout is contiguous.
};

}  // namespace inpo_fast
