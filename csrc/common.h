// SPDX-License-Identifier: Apache-2.0
// What every operator shares: checks, raw views of tensors, the choice of one dense layout, and of
// the device that runs the kernel.
#pragma once

// First: it says which torch the headers are to be compatible with.
#include "kernels.h"
// Then torch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef USE_CUDA
#include <cuda_runtime.h>
#endif

namespace inpo_fast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Python sees a RuntimeError. Not STD_TORCH_CHECK or TORCH_ERROR_CODE_CHECK, which write messages
// to a stream: where a toolchain links parts of the C++ library into the extension, and torch has
// another copy of it, the stream finds no locale and the process dies. (Functions of torch's
// headers that fail still do that.)
[[noreturn]] inline void refuse(const std::string& message) { throw std::runtime_error(message); }

inline void check(bool holds, const char* message) {
  if (!holds) refuse(message);
}

// Of a function of torch, which has told the error itself.
inline void succeed(AOTITorchError code, const char* failure) {
  check(code == TORCH_SUCCESS, failure);
}

// Elements that one thread takes at least. Below it a second thread costs more than it gains.
constexpr int64_t kGrain = 32768;

// Where a tensor is. Asked for once: each question to torch takes tens of nanoseconds.
struct Device {
  int32_t type = 0, index = 0;

  explicit Device(const Tensor& t) {
    succeed(aoti_torch_get_device_type(t.get(), &type), "a tensor has no device");
    succeed(aoti_torch_get_device_index(t.get(), &index), "a tensor has no device");
  }

  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
};

// The dtype of a tensor. torch's own conversion asks for the number of one dtype after the other,
// in seven times the time, and a call needs it a dozen times.
inline ScalarType dtype_of(const Tensor& t) {
  static const std::pair<int32_t, ScalarType> known[] = {
      {aoti_torch_dtype_float32(), ScalarType::Float},
      {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
      {aoti_torch_dtype_float16(), ScalarType::Half},
      {aoti_torch_dtype_int32(), ScalarType::Int},
      {aoti_torch_dtype_int64(), ScalarType::Long},
      {aoti_torch_dtype_float64(), ScalarType::Double}};
  int32_t number = 0;
  succeed(aoti_torch_get_dtype(t.get(), &number), "a tensor has no dtype");
  for (const auto& [own, dtype] : known) {
    if (number == own) return dtype;
  }
  return t.scalar_type();
}

inline Source source(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t)}; }
inline Source source(const OptionalTensor& t) { return t ? source(*t) : Source{}; }
inline Sink sink(const Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t)}; }

// These checks refuse whatever the Python ones do (inpo_fast/ops/validation.py), before anything is
// written. The Python functions leave tensors to them, and explain what they have refused.
inline void check_device(const Tensor& t, const Device& device) {
  const Device own(t);
  check(own.type == device.type && own.index == device.index, "expected tensors on one device");
}

inline void check_like(const Tensor& t, const Tensor& x, const Device& device) {
  check_device(t, device);
  const auto a = t.sizes(), b = x.sizes();
  check(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()),
        "expected tensors of one shape");
}

// Elements of an expanded tensor share memory.
inline void check_written(const Tensor& t) {
  if (t.numel() == 0) return;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    check(sizes[i] <= 1 || strides[i] != 0, "expected tensors to write to that are not expanded");
  }
}

inline void check_dtype(const Tensor& t, ScalarType dtype) {
  if (dtype_of(t) != dtype) {
    refuse(std::string("expected dtype ") + torch::headeronly::toString(dtype));
  }
}

inline bool is_16bit(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

inline void check_float(const Tensor& t, bool allow_double) {
  const ScalarType dtype = dtype_of(t);
  if (dtype != ScalarType::Float && !is_16bit(dtype) &&
      !(allow_double && dtype == ScalarType::Double)) {
    refuse(std::string("unexpected dtype ") + torch::headeronly::toString(dtype));
  }
}

// Constants of shape [width] or [B, width] (width 1: [], [1] or [B]), made contiguous.
class Constants {
 public:
  Constants(const Tensor& t, const Tensor& x, int64_t width, const Device& device)
      : tensor_(t.is_contiguous() ? t : torch::stable::contiguous(t)) {
    check_device(t, device);
    const int64_t dim = t.dim(), columns = width == 1 ? 0 : 1;
    const bool row = dim <= 1 && t.numel() == width;
    const bool rows = dim == columns + 1 && x.dim() > 0 && t.size(0) == x.size(0) &&
                      (columns == 0 || t.size(1) == width);
    if (!row && !rows) {
      refuse("constants must be one row of " + std::to_string(width) + ", or one per sample");
    }
    by_sample_ = rows && t.numel() != width;
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
inline int32_t* status_word(const Tensor& status, const Device& device) {
  check_device(status, device);
  check_dtype(status, ScalarType::Int);
  check(status.dim() == 1 && status.size(0) == 1, "status must have shape [1]");
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

// On a GPU launch(stream) with the device set, its current stream, and a check of the error
// code that it returns; on the CPU run().
template <class Launch, class Run>
void on_device(const Device& device, const Launch& launch, const Run& run) {
#ifdef USE_CUDA
  if (device.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(device.index);
    void* stream = nullptr;
    succeed(aoti_torch_get_current_cuda_stream(device.index, &stream), "there is no stream");
    STD_CUDA_CHECK(static_cast<cudaError_t>(launch(stream)));
    return;
  }
#endif
  check(device.is_cpu(), "this build of inpo_fast._C has no kernels for this device");
  run();
}

// Registers the same functions for every device with kernels.
#ifdef USE_CUDA
#define INPO_REGISTER(function)                                 \
  STABLE_TORCH_LIBRARY_IMPL(inpo_fast, CPU, m) { function(m); } \
  STABLE_TORCH_LIBRARY_IMPL(inpo_fast, CUDA, m) { function(m); }
#else
#define INPO_REGISTER(function) \
  STABLE_TORCH_LIBRARY_IMPL(inpo_fast, CPU, m) { function(m); }
#endif

inline Tensor empty_strided(const Device& device, const int64_t* sizes, const int64_t* strides,
                            int64_t dim, ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  AtenTensorHandle handle = nullptr;
  succeed(aoti_torch_empty_strided(dim, sizes, strides, to<int32_t>(from(dtype)), device.type,
                                   device.index, &handle),
          "torch could not make a tensor: out of memory?");
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
  Layout(const Tensor& x, const Device& device, bool by_sample);

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

  Device device_;
  int64_t numel_ = 0, dim_ = 0;
  const int64_t* sizes_ = nullptr;
  const int64_t* strides_ = nullptr;         // Of this layout.
  const int64_t* result_strides_ = nullptr;  // Of torch.empty_like(x).
  std::optional<Tensor> like_;               // Owns result_strides_ if x is not dense.
  std::vector<int64_t> contiguous_;          // Owns strides_ if this layout is contiguous.
};

}  // namespace inpo_fast
