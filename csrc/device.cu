#include "device.h"

#include <cuda_runtime.h>

#include "device_guard.h"

namespace tinyclip {
namespace {

// Carries no work: whether it can be loaded tells whether this build has code for a device.
__global__ void probe_kernel() {}

std::string message(cudaError_t status) {
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // a failed query must not turn up as the error of the next launch
  return cudaGetErrorString(status);
}

}  // namespace

CudaStatus cuda_status() {
  CudaStatus status;
  cudaDriverGetVersion(&status.driver);
  cudaRuntimeGetVersion(&status.runtime);
  status.error = message(cudaGetDeviceCount(&status.devices));
  if (!status.error.empty()) status.devices = 0;
  return status;
}

std::string cuda_probe(int device) {
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return message(guard.status());
  cudaFuncAttributes attributes;
  return message(cudaFuncGetAttributes(&attributes, probe_kernel));
}

std::string cuda_version() {
  return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
}

}  // namespace tinyclip
