// SPDX-License-Identifier: Apache-2.0
// The Python module inpo_fast._C: importing it loads the kernels; it tells how they were built.
#include <pybind11/pybind11.h>

#include <string>

#include "targets.h"

#ifndef INPO_FAST_BUILD_FLAGS
#define INPO_FAST_BUILD_FLAGS ""
#endif
#ifndef INPO_FAST_CUDA_ARCHITECTURES
#define INPO_FAST_CUDA_ARCHITECTURES ""
#endif
#ifndef INPO_FAST_TORCH_VERSION
#define INPO_FAST_TORCH_VERSION ""
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// 0x020b000000000000 is 2.11.0.
std::string target_version() {
  const unsigned long long version = INPO_FAST_TORCH_TARGET;
  return std::to_string(version >> 56) + "." + std::to_string(version >> 48 & 0xff) + "." +
         std::to_string(version >> 40 & 0xff);
}

const char* simd() { return inpo_fast::has_avx2() ? "avx2" : "baseline"; }

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["flags"] = INPO_FAST_BUILD_FLAGS;
  py::list devices;
  info["cuda_architectures"] = py::str(INPO_FAST_CUDA_ARCHITECTURES).attr("split")();
  info["torch_version"] = INPO_FAST_TORCH_VERSION;
  info["torch_target_version"] = target_version();
  devices.append("cpu");
#ifdef USE_CUDA
  devices.append("cuda");
#endif
  info["devices"] = devices;
  info["simd"] = simd();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of inpo_fast and how they were built.";
  m.def("build_info", &build_info);
  m.def("simd", &simd, "The instruction set in use.");
  m.def(
      "allow_simd", [](bool allowed) { inpo_fast::simd_allowed = allowed; }, py::arg("allowed"),
      "Allow the kernels for this processor, or only the portable ones (for tests).");
}
