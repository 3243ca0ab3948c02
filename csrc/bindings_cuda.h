// The part of the bindings that is there only where the extension holds CUDA code.
#pragma once

#include <pybind11/pybind11.h>

namespace tinyclip {

void bind_cuda(pybind11::module_& m);

}  // namespace tinyclip
