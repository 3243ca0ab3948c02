// What the CUDA half says about itself and about the machine it runs on.
#pragma once

#include <string>

namespace tinyclip {

// Versions as CUDA counts them: 1000 * major + 10 * minor; driver is 0 where there is none.
struct CudaStatus {
  int driver = 0;
  int runtime = 0;
  int devices = 0;
  std::string error;  // why no device can be used; empty where one can
};

// Asks the driver and creates no context, so it takes no memory on any device.
CudaStatus cuda_status();

// Why this build's code cannot run on a device, empty where it can. Creates the device's context.
std::string cuda_probe(int device);

// The toolkit's version, such as "13.0".
std::string cuda_version();

}  // namespace tinyclip
