// SPDX-License-Identifier: Apache-2.0
// The preference errors and their backward on the CPU. The equations are in
// inpo_fast/ops/reference.py, under the same names.
#include <limits>

#include "common.h"
#include "targets.h"

namespace inpo_fast {
namespace {

// Elements that are summed in one go. Fixed, so that the order of a sum depends neither on the
// number of threads nor on which of them comes first.
constexpr int64_t kBlock = 16384;

struct ErrorArguments {
  Source theta, ref, target;
  int64_t numel, per_sample, blocks;  // Blocks per sample.
  double* sums;                       // [B * blocks, 3]
};

struct BackwardArguments {
  Source theta, ref, target;
  Rows a, b;
  int64_t per_sample;
  Sink out;
};

}  // namespace
}  // namespace inpo_fast

#define INPO_KERNELS "preference.inl"
#include "foreach_target.h"

namespace inpo_fast {
namespace {

void check_operands(const Tensor& theta, const OptionalTensor& ref, const Tensor& target) {
  check_cpu(theta);
  check_float(theta, true);
  STD_TORCH_CHECK(theta.dim() > 0, "theta must have a batch dimension");
  if (ref) {
    check_like(*ref, theta);
    check_dtype(*ref, theta.scalar_type());
  }
  check_like(target, theta);
  if (!is_16bit(theta.scalar_type()) || target.scalar_type() != ScalarType::Float) {
    check_dtype(target, theta.scalar_type());
  }
}

ScalarType error_dtype(const Tensor& theta) {
  return theta.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor> preference_errors(Tensor theta, OptionalTensor ref,
                                                     Tensor target) {
  check_operands(theta, ref, target);
  const Layout layout(theta, true);
  const Tensor theta_flat = layout.input(theta), target_flat = layout.input(target);
  const OptionalTensor ref_flat = layout.input(ref);

  const int64_t batch = theta.size(0), per_sample = layout.per_sample();
  const int64_t blocks = (per_sample + kBlock - 1) / kBlock;
  std::vector<double> sums(3 * batch * blocks);  // [B * blocks, 3]
  const ErrorArguments arguments{source(theta_flat), source(ref_flat), source(target_flat),
                                 layout.numel(),     per_sample,       blocks,
                                 sums.data()};
  parallel(INPO_CHOOSE(errors), arguments, batch * blocks, nullptr, kGrain / kBlock);

  const ScalarType dtype = error_dtype(theta);
  const int64_t stride = 1;
  Tensor results[3];
  for (int64_t k = 0; k < 3; ++k) {
    results[k] = empty_strided(&batch, &stride, 1, dtype);  // [B]
    const bool absent = k > 0 && !ref;
    for (int64_t sample = 0; sample < batch; ++sample) {
      double total = 0.0;
      for (int64_t block = 0; block < blocks; ++block) {
        total += sums[3 * (sample * blocks + block) + k];
      }
      const double nan = std::numeric_limits<double>::quiet_NaN();
      const double mean = absent            ? 0.0
                          : per_sample == 0 ? nan
                                            : total / static_cast<double>(per_sample);
      if (dtype == ScalarType::Double) {
        static_cast<double*>(results[k].mutable_data_ptr())[sample] = mean;
      } else {
        static_cast<float*>(results[k].mutable_data_ptr())[sample] = static_cast<float>(mean);
      }
    }
  }
  return {results[0], results[1], results[2]};
}

Tensor preference_backward(Tensor theta, OptionalTensor ref, Tensor target, Tensor a, Tensor b) {
  check_operands(theta, ref, target);
  check_dtype(a, error_dtype(theta));
  check_dtype(b, error_dtype(theta));
  const Layout layout(theta, true);
  const Tensor theta_flat = layout.input(theta), target_flat = layout.input(target);
  const OptionalTensor ref_flat = layout.input(ref);
  const Constants a_rows(a, theta, 1), b_rows(b, theta, 1);
  const Tensor out = layout.output(theta.scalar_type());
  const BackwardArguments arguments{source(theta_flat), source(ref_flat), source(target_flat),
                                    a_rows.rows(1),     b_rows.rows(1),   layout.per_sample(),
                                    sink(out)};
  parallel(INPO_CHOOSE(backward), arguments, layout.numel(), nullptr);
  return layout.finish(out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inpo_fast, CPU, m) {
  m.impl("preference_errors", TORCH_BOX(&preference_errors));
  m.impl("preference_backward", TORCH_BOX(&preference_backward));
}

}  // namespace inpo_fast
