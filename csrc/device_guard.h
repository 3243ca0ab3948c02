// Makes a device current, and afterwards what was current before.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace tinyclip {

// The driver's functions, found through the runtime: nothing links libcuda, so that _C is imported
// where there is no driver.
struct CurrentContext {
  CUresult (*get)(CUcontext*) = nullptr;
  CUresult (*set)(CUcontext) = nullptr;
  cudaError_t status = cudaSuccess;

  CurrentContext() {
    find("cuCtxGetCurrent", reinterpret_cast<void**>(&get));
    find("cuCtxSetCurrent", reinterpret_cast<void**>(&set));
  }

  static const CurrentContext& functions() {
    static const CurrentContext found;
    return found;
  }

 private:
  void find(const char* name, void** function) {
    if (status != cudaSuccess) return;
#if CUDART_VERSION >= 12050
    status = cudaGetDriverEntryPointByVersion(name, function, 12000, cudaEnableDefault);
#else
    status = cudaGetDriverEntryPoint(name, function, cudaEnableDefault);
#endif
    if (status == cudaSuccess && *function == nullptr) status = cudaErrorSymbolNotFound;
  }
};

// The device current for as long as this lives.
//
// Our runtime is linked in, torch's is a shared library: all that the two have in common is the
// context that the driver holds current in a thread. cudaSetDevice binds the device's primary one,
// so the kernel runs there whatever either runtime remembers. What was current is restored by the
// driver and not by number: of a thread without a context cudaGetDevice says 0, and
// cudaSetDevice(0) initializes that device since CUDA 12, hundreds of MB for a process whose
// tensors all lie on another. Nothing, too, is restored as it was; torch counts on that.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : status_(CurrentContext::functions().status) {
    if (status_ != cudaSuccess) return;
    if (CurrentContext::functions().get(&before_) != CUDA_SUCCESS) before_ = nullptr;
    status_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (CurrentContext::functions().status == cudaSuccess) CurrentContext::functions().set(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  CUcontext before_ = nullptr;
  cudaError_t status_;
};

}  // namespace tinyclip
