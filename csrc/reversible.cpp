// SPDX-License-Identifier: Apache-2.0
// The reversible affine update, for float states and for lattice states. The equations are in
// inpo_fast/ops/reference.py, under the same names.
#include "common.h"
#include "targets.h"

#define INPO_KERNELS "reversible.inl"
#include "foreach_target.h"

namespace inpo_fast {
namespace {

// Elements that share a row of constants.
int64_t per_row(const Layout& layout, bool by_sample) {
  return by_sample ? layout.per_sample() : layout.numel();
}

LatticeUnit lattice_unit(int64_t frac_bits) {
  check(frac_bits >= 1 && frac_bits <= 30, "frac_bits must be in 1..30");
  return LatticeUnit(frac_bits);
}

void check_outputs(const OptionalTensor& m1, const OptionalTensor& m2, const Tensor& x,
                   const Device& device, bool allow_double) {
  check(m1.has_value() || !m2.has_value(), "m2 needs m1");
  for (const OptionalTensor* m : {&m1, &m2}) {
    if (!m->has_value()) continue;
    check_like(**m, x, device);
    check_float(**m, allow_double);
  }
  // GPU kernels read both as what the first one is.
  if (m2) check_dtype(*m2, dtype_of(*m1));
}

// --- Float states ---

// The operands in one layout, alive while a kernel runs.
template <bool kInverse, bool kInPlace>
Tensor run_affine(const Tensor& x, const Tensor& y, const OptionalTensor& m1,
                  const OptionalTensor& m2, const Tensor& coef, const OptionalTensor& status) {
  const ScalarType dtype = dtype_of(x);
  const bool wide = dtype == ScalarType::Double;
  const Device device(x);
  check_float(x, true);
  check_like(y, x, device);
  check_dtype(y, dtype);
  check_outputs(m1, m2, x, device, wide);
  check_dtype(coef, wide ? ScalarType::Double : ScalarType::Float);
  if constexpr (kInPlace) check_written(x);
  int32_t* word = status ? status_word(*status, device) : nullptr;

  const Constants rows(coef, x, 4, device);
  const Layout layout(x, device, rows.by_sample());
  const Tensor x_flat = layout.input(x), y_flat = layout.input(y);
  const OptionalTensor m1_flat = layout.input(m1), m2_flat = layout.input(m2);
  const Tensor out = kInPlace ? layout.target(x) : layout.output(dtype);
  const AffineArguments arguments{source(x_flat),  source(y_flat),
                                  source(m1_flat), source(m2_flat),
                                  rows.rows(4),    per_row(layout, rows.by_sample()),
                                  sink(out)};
  on_device(
      device,
      [&](void* stream) { return cuda::affine(arguments, kInverse, layout.numel(), word, stream); },
      [&] { parallel(INPO_CHOOSE(affine<kInverse>), arguments, layout.numel(), word); });
  if constexpr (kInPlace) {
    Layout::finish_into(x, out);
    return x;
  } else {
    return layout.finish(out);
  }
}

template <bool kInverse>
Tensor affine(Tensor x, Tensor y, OptionalTensor m1, OptionalTensor m2, Tensor coef,
              OptionalTensor status) {
  return run_affine<kInverse, false>(x, y, m1, m2, coef, status);
}

template <bool kInverse>
void affine_(Tensor x, Tensor y, OptionalTensor m1, OptionalTensor m2, Tensor coef,
             OptionalTensor status) {
  run_affine<kInverse, true>(x, y, m1, m2, coef, status);
}

// --- Lattice states ---

const int32_t* int32_data(const Tensor& t) {
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// Without a buffer (null) the update is a plain addition.
template <bool kInverse, bool kInPlace>
std::tuple<Tensor, Tensor> run_lattice(const Tensor& z, const Tensor* buffer, const Tensor& y,
                                       const OptionalTensor& m1, const OptionalTensor& m2,
                                       const Tensor& coef, const Tensor* ratio, int64_t frac_bits,
                                       const Tensor& status) {
  const Device device(z);
  check_dtype(z, ScalarType::Int);
  check_like(y, z, device);
  check_dtype(y, ScalarType::Int);
  check_outputs(m1, m2, z, device, false);
  check_dtype(coef, ScalarType::Float);
  if constexpr (kInPlace) check_written(z);
  int32_t* word = status_word(status, device);

  const Constants rows(coef, z, 4, device);
  std::optional<Constants> ratios;
  if (buffer != nullptr) {
    check_like(*buffer, z, device);
    check_dtype(*buffer, ScalarType::Long);
    check_dtype(*ratio, ScalarType::Long);
    if constexpr (kInPlace) check_written(*buffer);
    ratios.emplace(*ratio, z, 4, device);
  }
  const bool by_sample = rows.by_sample() || (ratios && ratios->by_sample());
  const Layout layout(z, device, by_sample);
  const Tensor z_flat = layout.input(z), y_flat = layout.input(y);
  const OptionalTensor m1_flat = layout.input(m1), m2_flat = layout.input(m2);
  const Tensor out = kInPlace ? layout.target(z) : layout.output(ScalarType::Int);
  LatticeArguments arguments{int32_data(z_flat),
                             int32_data(y_flat),
                             nullptr,
                             source(m1_flat),
                             source(m2_flat),
                             rows.rows(4),
                             nullptr,
                             false,
                             per_row(layout, by_sample),
                             lattice_unit(frac_bits),
                             static_cast<int32_t*>(out.mutable_data_ptr()),
                             nullptr};
  OptionalTensor buffer_flat, buffer_out;
  if (buffer != nullptr) {
    buffer_flat = layout.input(*buffer);
    buffer_out = kInPlace ? layout.target(*buffer) : layout.output(ScalarType::Long);
    arguments.buffer = static_cast<const int64_t*>(buffer_flat->const_data_ptr());
    arguments.buffer_out = static_cast<int64_t*>(buffer_out->mutable_data_ptr());
    arguments.ratio = ratios->int64_data();
    arguments.ratio_by_sample = ratios->by_sample();
  }
  on_device(
      device,
      [&](void* stream) {
        return cuda::lattice(arguments, kInverse, layout.numel(), word, stream);
      },
      [&] {
        const auto kernel = buffer == nullptr ? INPO_CHOOSE(lattice<kInverse>)
                                              : INPO_CHOOSE(lattice_scaled<kInverse>);
        parallel(kernel, arguments, layout.numel(), word);
      });
  if constexpr (kInPlace) {
    Layout::finish_into(z, out);
    if (buffer != nullptr) Layout::finish_into(*buffer, *buffer_out);
    return {z, z};
  } else if (buffer == nullptr) {
    return {layout.finish(out), out};
  } else {
    // A buffer in another layout than z keeps its own.
    const Layout own(*buffer, device, false);
    return {layout.finish(out), own.input(*buffer_out)};
  }
}

template <bool kInverse>
Tensor lattice(Tensor z, Tensor y, OptionalTensor m1, OptionalTensor m2, Tensor coef,
               int64_t frac_bits, Tensor status) {
  return std::get<0>(
      run_lattice<kInverse, false>(z, nullptr, y, m1, m2, coef, nullptr, frac_bits, status));
}

template <bool kInverse>
void lattice_(Tensor z, Tensor y, OptionalTensor m1, OptionalTensor m2, Tensor coef,
              int64_t frac_bits, Tensor status) {
  run_lattice<kInverse, true>(z, nullptr, y, m1, m2, coef, nullptr, frac_bits, status);
}

template <bool kInverse>
std::tuple<Tensor, Tensor> lattice_scaled(Tensor z, Tensor buffer, Tensor y, OptionalTensor m1,
                                          OptionalTensor m2, Tensor coef, Tensor ratio,
                                          int64_t frac_bits, Tensor status) {
  return run_lattice<kInverse, false>(z, &buffer, y, m1, m2, coef, &ratio, frac_bits, status);
}

template <bool kInverse>
void lattice_scaled_(Tensor z, Tensor buffer, Tensor y, OptionalTensor m1, OptionalTensor m2,
                     Tensor coef, Tensor ratio, int64_t frac_bits, Tensor status) {
  run_lattice<kInverse, true>(z, &buffer, y, m1, m2, coef, &ratio, frac_bits, status);
}

// --- Into and out of the lattice ---

void check_scale(const Tensor& scale) {
  check(dtype_of(scale) == ScalarType::Float || dtype_of(scale) == ScalarType::Double,
        "scale must be float32 or float64");
}

Tensor lattice_encode(Tensor x, Tensor scale, int64_t frac_bits, Tensor status) {
  const Device device(x);
  check_float(x, true);
  check_scale(scale);
  const Constants scales(scale, x, 1, device);
  const Layout layout(x, device, scales.by_sample());
  const Tensor x_flat = layout.input(x);
  const Tensor out = layout.output(ScalarType::Int);
  const EncodeArguments arguments{source(x_flat), scales.rows(1),
                                  per_row(layout, scales.by_sample()), lattice_unit(frac_bits),
                                  static_cast<int32_t*>(out.mutable_data_ptr())};
  int32_t* word = status_word(status, device);
  on_device(
      device, [&](void* stream) { return cuda::encode(arguments, layout.numel(), word, stream); },
      [&] { parallel(INPO_CHOOSE(encode), arguments, layout.numel(), word); });
  return layout.finish(out);
}

Tensor lattice_decode(Tensor z, Tensor scale, int64_t frac_bits, int64_t copies, ScalarType dtype) {
  const Device device(z);
  check_dtype(z, ScalarType::Int);
  check_scale(scale);
  check(copies == 1 || (copies == 2 && z.dim() > 0), "copies must be 1 or 2");
  const Constants scales(scale, z, 1, device);
  const Layout layout(z, device, scales.by_sample() || copies > 1);
  const Tensor z_flat = layout.input(z);
  const Tensor out = layout.output(dtype, copies);
  check_float(out, true);
  const DecodeArguments arguments{int32_data(z_flat),
                                  scales.rows(1),
                                  per_row(layout, scales.by_sample()),
                                  lattice_unit(frac_bits),
                                  copies,
                                  layout.numel(),
                                  sink(out)};
  on_device(
      device, [&](void* stream) { return cuda::decode(arguments, stream); },
      [&] { parallel(INPO_CHOOSE(decode), arguments, layout.numel(), nullptr); });
  return copies == 1 ? layout.finish(out) : out;
}

void register_reversible(torch::stable::detail::StableLibrary& m) {
  m.impl("affine_update", TORCH_BOX(&affine<false>));
  m.impl("affine_inverse", TORCH_BOX(&affine<true>));
  m.impl("affine_update_", TORCH_BOX(&affine_<false>));
  m.impl("affine_inverse_", TORCH_BOX(&affine_<true>));
  m.impl("lattice_update", TORCH_BOX(&lattice<false>));
  m.impl("lattice_inverse", TORCH_BOX(&lattice<true>));
  m.impl("lattice_update_", TORCH_BOX(&lattice_<false>));
  m.impl("lattice_inverse_", TORCH_BOX(&lattice_<true>));
  m.impl("lattice_scaled_update", TORCH_BOX(&lattice_scaled<false>));
  m.impl("lattice_scaled_inverse", TORCH_BOX(&lattice_scaled<true>));
  m.impl("lattice_scaled_update_", TORCH_BOX(&lattice_scaled_<false>));
  m.impl("lattice_scaled_inverse_", TORCH_BOX(&lattice_scaled_<true>));
  m.impl("lattice_encode", TORCH_BOX(&lattice_encode));
  m.impl("lattice_decode", TORCH_BOX(&lattice_decode));
}

}  // namespace

INPO_REGISTER(register_reversible)

}  // namespace inpo_fast
