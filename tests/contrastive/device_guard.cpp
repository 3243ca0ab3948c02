// csrc/device_guard.h over a driver and a runtime of our own: which context a thread has, and which
// devices have one.
#include "device_guard.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace {

constexpr int kDevices = 2;
CUcontext current = nullptr;
bool initialized[kDevices];
int memory[kDevices];

CUcontext primary(int device) { return reinterpret_cast<CUcontext>(&memory[device]); }

CUresult get_current(CUcontext* found) {
  *found = current;
  return CUDA_SUCCESS;
}

CUresult set_current(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

void start(CUcontext context) {
  current = context;
  for (int n = 0; n < kDevices; ++n) initialized[n] = context == primary(n);
}

int failures = 0;
void expect(bool holds, const char* what) {
  if (!holds) std::printf("%s\n", what);
  failures += !holds;
}

}  // namespace

extern "C" cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  initialized[device] = true;
  current = primary(device);
  return cudaSuccess;
}

extern "C" cudaError_t cudaGetDevice(int* device) {
  *device = current == primary(1) ? 1 : 0;  // 0 also where nothing is current
  return cudaSuccess;
}

namespace {

cudaError_t find(const char* name, void** function) {
  const bool get = std::strcmp(name, "cuCtxGetCurrent") == 0;
  *function = get ? reinterpret_cast<void*>(&get_current) : reinterpret_cast<void*>(&set_current);
  return cudaSuccess;
}

}  // namespace

#if CUDART_VERSION >= 12050
extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                        unsigned long long,
                                                        cudaDriverEntryPointQueryResult*) {
  return find(name, function);
}
#else
extern "C" cudaError_t cudaGetDriverEntryPoint(const char* name, void** function,
                                               unsigned long long,
                                               cudaDriverEntryPointQueryResult*) {
  return find(name, function);
}
#endif

int main() {
  using tinyclip::DeviceGuard;
  for (CUcontext before : {CUcontext(nullptr), primary(0), primary(1)}) {
    start(before);
    {
      const DeviceGuard guard(1);
      expect(guard.status() == cudaSuccess, "the device could not be set");
      expect(current == primary(1), "the device is not current inside");
    }
    expect(current == before, "what was current is not afterwards");
    expect(initialized[0] == (before == primary(0)), "device 0 was initialized");
    try {
      const DeviceGuard guard(1);
      throw std::runtime_error("");
    } catch (const std::runtime_error&) {
    }
    expect(current == before, "what was current is not after an exception");
    expect(DeviceGuard(kDevices).status() == cudaErrorInvalidDevice, "no error of a wrong device");
    expect(current == before, "what was current is not after an error");
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
