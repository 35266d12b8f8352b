// SPDX-License-Identifier: Apache-2.0
// The preference errors and their backward. The equations are in inpo_fast/ops/reference.py, under
// the same names.
#include "common.h"
#include "targets.h"

namespace inpo_fast {
namespace {

// Elements that are summed in one go. Fixed, so that the order of a sum depends neither on the
// number of threads nor on which of them comes first.
constexpr int64_t kBlock = 16384;

}  // namespace
}  // namespace inpo_fast

#define INPO_KERNELS "preference.inl"
#include "foreach_target.h"

namespace inpo_fast {
namespace {

void check_operands(const Tensor& theta, const OptionalTensor& ref, const Tensor& target,
                    const Device& device) {
  check_float(theta, true);
  check(theta.dim() > 0, "theta must have a batch dimension");
  if (ref) {
    check_like(*ref, theta, device);
    check_dtype(*ref, dtype_of(theta));
  }
  check_like(target, theta, device);
  if (!is_16bit(dtype_of(theta)) || dtype_of(target) != ScalarType::Float) {
    check_dtype(target, dtype_of(theta));
  }
}

ScalarType error_dtype(const Tensor& theta) {
  return dtype_of(theta) == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The sums of all blocks, then means of samples in the order of their blocks.
void errors_on_cpu(const ErrorArguments& arguments, int64_t batch, const Sink (&results)[3]) {
  parallel(INPO_CHOOSE(errors), arguments, batch * arguments.blocks, nullptr, kGrain / kBlock);
  for (int64_t k = 0; k < 3; ++k) {
    const bool absent = k > 0 && !arguments.has_ref;
    for (int64_t sample = 0; sample < batch; ++sample) {
      double total = 0.0;
      for (int64_t block = 0; block < arguments.blocks; ++block) {
        total += arguments.sums[3 * (sample * arguments.blocks + block) + k];
      }
      // 0 / 0, for a sample without elements, is NaN.
      const double mean = absent ? 0.0 : total / static_cast<double>(arguments.per_sample);
      if (results[k].dtype == ScalarType::Double) {
        static_cast<double*>(results[k].data)[sample] = mean;
      } else {
        static_cast<float*>(results[k].data)[sample] = static_cast<float>(mean);
      }
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> preference_errors(Tensor theta, OptionalTensor ref,
                                                     Tensor target) {
  const Device device(theta);
  check_operands(theta, ref, target, device);
  const Layout layout(theta, device, true);
  const Tensor theta_flat = layout.input(theta), target_flat = layout.input(target);
  const OptionalTensor ref_flat = layout.input(ref);

  const int64_t batch = theta.size(0), per_sample = layout.per_sample(), stride = 1;
  const auto vector = [&](int64_t size, ScalarType dtype) {
    return empty_strided(device, &size, &stride, 1, dtype);
  };
  const ScalarType dtype = error_dtype(theta);
  const Tensor e_theta = vector(batch, dtype), e_ref = vector(batch, dtype),
               d = vector(batch, dtype);  // [B] each
  const Sink results[3] = {sink(e_theta), sink(e_ref), sink(d)};
  const int64_t blocks =
      device.is_cuda() ? error_blocks(batch, per_sample) : (per_sample + kBlock - 1) / kBlock;
  const Tensor sums = vector(3 * batch * blocks, ScalarType::Double);  // [B * blocks * 3]
  const ErrorArguments arguments{source(theta_flat),
                                 source(ref_flat),
                                 source(target_flat),
                                 ref.has_value(),
                                 layout.numel(),
                                 per_sample,
                                 blocks,
                                 static_cast<double*>(sums.mutable_data_ptr())};
  on_device(
      device, [&](void* stream) { return cuda::errors(arguments, batch, results, stream); },
      [&] { errors_on_cpu(arguments, batch, results); });
  return {e_theta, e_ref, d};
}

Tensor preference_backward(Tensor theta, OptionalTensor ref, Tensor target, Tensor a, Tensor b) {
  const Device device(theta);
  check_operands(theta, ref, target, device);
  check_dtype(a, error_dtype(theta));
  check_dtype(b, error_dtype(theta));
  const Layout layout(theta, device, true);
  const Tensor theta_flat = layout.input(theta), target_flat = layout.input(target);
  const OptionalTensor ref_flat = layout.input(ref);
  for (const Tensor* weight : {&a, &b}) {
    check(weight->dim() == 1 && weight->size(0) == theta.size(0), "expected one weight per sample");
  }
  const Constants a_rows(a, theta, 1, device), b_rows(b, theta, 1, device);
  const Tensor out = layout.output(dtype_of(theta));
  const BackwardArguments arguments{source(theta_flat), source(ref_flat), source(target_flat),
                                    a_rows.rows(1),     b_rows.rows(1),   layout.per_sample(),
                                    sink(out)};
  on_device(
      device, [&](void* stream) { return cuda::backward(arguments, layout.numel(), stream); },
      [&] { parallel(INPO_CHOOSE(backward), arguments, layout.numel(), nullptr); });
  return layout.finish(out);
}

void register_preference(torch::stable::detail::StableLibrary& m) {
  m.impl("preference_errors", TORCH_BOX(&preference_errors));
  m.impl("preference_backward", TORCH_BOX(&preference_backward));
}

}  // namespace

INPO_REGISTER(register_preference)

}  // namespace inpo_fast
