// The Python module; the files named bindings*.cpp alone know Python. They are compiled with
// TINYCLIP_CUDA_ARCHS defined where the .cu files are compiled and linked too.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <dlfcn.h>
#include <omp.h>
#endif

#include "bindings.h"
#ifdef TINYCLIP_CUDA_ARCHS
#include "device.h"
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#ifdef __clang__
  return "clang " __VERSION__;
#else
  return "gcc " __VERSION__;
#endif
}

// The library that runs our parallel loops: torch's own, when torch was imported first.
py::object openmp_library() {
#ifdef _OPENMP
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info)) return py::str(info.dli_fname);
#endif
  return py::none();
}

#define TINYCLIP_TEXT(...) #__VA_ARGS__
#define TINYCLIP_EXPANDED_TEXT(...) TINYCLIP_TEXT(__VA_ARGS__)

py::dict build_info() {
  py::dict info;
  std::vector<std::string> architectures;
  info["compiler"] = compiler();
  info["cuda"] = py::none();
#ifdef TINYCLIP_CUDA_ARCHS
  info["cuda"] = tinyclip::cuda_version();
  std::istringstream names(TINYCLIP_EXPANDED_TEXT(TINYCLIP_CUDA_ARCHS));
  for (std::string name; std::getline(names, name, ',');) architectures.push_back(name);
#endif
  info["architectures"] = architectures;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["openmp_library"] = openmp_library();
  return info;
}

#ifdef TINYCLIP_CUDA_ARCHS
py::dict cuda_status() {
  tinyclip::CudaStatus status;
  {
    py::gil_scoped_release release;
    status = tinyclip::cuda_status();
  }
  py::dict result;
  result["driver"] = status.driver;
  result["runtime"] = status.runtime;
  result["devices"] = status.devices;
  result["error"] = status.error.empty() ? py::object(py::none()) : py::str(status.error);
  return result;
}

py::object cuda_probe(int device) {
  std::string error;
  {
    py::gil_scoped_release release;
    error = tinyclip::cuda_probe(device);
  }
  return error.empty() ? py::object(py::none()) : py::str(error);
}
#endif

// Of one core; 0 where the system does not say.
tinyclip::Index second_level_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  return std::max<tinyclip::Index>(sysconf(_SC_LEVEL2_CACHE_SIZE), 0);
#else
  return 0;
#endif
}

std::vector<std::string> isas() {
  std::vector<std::string> names{"baseline"};
  if (tinyclip::has(tinyclip::Isa::kAvx2)) names.push_back("avx2");
  if (tinyclip::has(tinyclip::Isa::kAvx512)) names.push_back("avx512");
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "TinyCLIP's compiled code. Use it through tinyclip._extension.";
  m.def("build_info", &build_info, "What this extension was built with.");
  m.def("second_level_cache", &second_level_cache,
        "Bytes of a core's second-level cache, 0 where the system does not say.");
  m.def("isas", &isas,
        "The instruction sets that the CPU code can use here; the last is the best.");
  tinyclip::bind_contrastive(m);
  tinyclip::bind_rowwise(m);
#ifdef TINYCLIP_CUDA_ARCHS
  m.def("cuda_status", &cuda_status,
        "Driver and runtime versions (1000 * major + 10 * minor), devices, and the error or None.");
  m.def("cuda_probe", &cuda_probe, py::arg("device"),
        "Why this build's CUDA code cannot run on a device, or None.");
#endif
  tinyclip::bind_cuda(m);
}
