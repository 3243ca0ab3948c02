// What the files that know Python share: the parts of the module, and arguments that they all take.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <tuple>

#include "check.h"
#include "isa.h"

namespace tinyclip {

void bind_contrastive(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);  // nothing where the extension holds no CUDA code
void bind_rowwise(pybind11::module_& m);

// Addresses and sizes come as tuples, in elements unless they say bytes.
using Address = std::uintptr_t;
using Strided = std::tuple<Address, Index>;  // address, stride

// Numbers of the right type only: a float is no size, and a tensor is no number.
inline pybind11::arg arg(const char* name) { return pybind11::arg(name).noconvert(); }

inline Isa isa_of(const Check& check, const std::string& name) {
  static const std::tuple<const char*, Isa> known[] = {{"best", Isa::kBest},
                                                       {"baseline", Isa::kBaseline},
                                                       {"avx2", Isa::kAvx2},
                                                       {"avx512", Isa::kAvx512}};
  for (const auto& [known_name, isa] : known) {
    if (name != known_name) continue;
    check.require(has(isa), "isa must be one that this processor has, got '" + name + "'");
    return isa;
  }
  check.require(false, "isa must be best, baseline, avx2 or avx512, got '" + name + "'");
  return Isa::kBest;
}

// call(T{}) for the type that the name stands for.
template <class Call>
auto with_type(const Check& check, const std::string& dtype, Call call) {
  check.require(dtype == "float32" || dtype == "float64",
                "dtype must be float32 or float64, got '" + dtype + "'");
  return dtype == "float32" ? call(float()) : call(double());
}

constexpr int kMostThreads = 4096;

inline void check_threads(const Check& check, int count) {
  check.require(
      1 <= count && count <= kMostThreads,
      "threads must be in [1, " + std::to_string(kMostThreads) + "], got " + std::to_string(count));
}

}  // namespace tinyclip
