// SPDX-License-Identifier: Apache-2.0
#include "common.h"

namespace inpo_fast {

namespace {

// Whole samples are blocks of memory: dimension 0 is the outermost one.
bool batch_is_outermost(const int64_t* sizes, const int64_t* strides, int64_t dim, int64_t numel) {
  return dim > 0 && numel > 0 && sizes[0] * strides[0] == numel;
}

}  // namespace

bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const int64_t dim = t.dim();
  const int64_t* sizes = t.sizes().data();
  const int64_t* strides = t.strides().data();
  std::vector<int64_t> order;
  order.reserve(dim);
  for (int64_t i = 0; i < dim; ++i) {
    if (sizes[i] != 1) order.push_back(i);
  }
  std::sort(order.begin(), order.end(),
            [strides](int64_t i, int64_t j) { return strides[i] < strides[j]; });
  int64_t expected = 1;
  for (const int64_t i : order) {
    if (strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

Layout::Layout(const Tensor& x, const Device& device, bool by_sample) : device_(device) {
  numel_ = x.numel();
  dim_ = x.dim();
  sizes_ = x.sizes().data();
  if (is_dense(x)) {
    result_strides_ = x.strides().data();
  } else {
    like_ = torch::stable::empty_like(x);
    result_strides_ = like_->strides().data();
  }
  strides_ = result_strides_;
  if (by_sample && !batch_is_outermost(sizes_, strides_, dim_, numel_)) {
    contiguous_.resize(dim_);
    int64_t stride = 1;
    for (int64_t i = dim_ - 1; i >= 0; --i) {
      contiguous_[i] = stride;
      stride *= std::max<int64_t>(sizes_[i], 1);
    }
    strides_ = contiguous_.data();
  }
}

bool Layout::matches(const Tensor& t) const {
  const int64_t* strides = t.strides().data();
  for (int64_t i = 0; i < dim_; ++i) {
    if (sizes_[i] != 1 && strides[i] != strides_[i]) return false;
  }
  return true;
}

Tensor Layout::input(const Tensor& t) const {
  if (matches(t)) return t;
  Tensor copy = empty_strided(device_, sizes_, strides_, dim_, dtype_of(t));
  torch::stable::copy_(copy, t);
  return copy;
}

OptionalTensor Layout::input(const OptionalTensor& t) const {
  return t ? OptionalTensor(input(*t)) : std::nullopt;
}

Tensor Layout::output(ScalarType dtype, int64_t copies) const {
  if (copies == 1) return empty_strided(device_, sizes_, strides_, dim_, dtype);
  std::vector<int64_t> sizes(sizes_, sizes_ + dim_);
  sizes[0] *= copies;
  return empty_strided(device_, sizes.data(), strides_, dim_, dtype);
}

Tensor Layout::target(const Tensor& x) const { return matches(x) ? x : output(dtype_of(x)); }

Tensor Layout::finish(const Tensor& result) const {
  if (strides_ == result_strides_) return result;
  Tensor copy = empty_strided(device_, sizes_, result_strides_, dim_, dtype_of(result));
  torch::stable::copy_(copy, result);
  return copy;
}

void Layout::finish_into(Tensor x, const Tensor& result) {
  if (x.get() != result.get()) torch::stable::copy_(x, result);
}

}  // namespace inpo_fast
