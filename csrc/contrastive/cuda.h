// The engine's passes over a panel, launched on a GPU. Nothing here waits, allocates or copies.
#pragma once

#include <string>

#include "contrastive/cuda_layout.h"

namespace tinyclip::contrastive {

// Where to launch: a device's index, and a stream of it.
struct Launch {
  int device = 0;
  std::uintptr_t stream = 0;
};

// "" or what CUDA said of the launch.
struct CudaPasses {
  std::string (*stats)(const StatsArgs&, bool teacher, const Launch&);
  std::string (*grads)(const GradsArgs&, bool teacher, const Launch&);
};

CudaPasses bf16_passes();
CudaPasses fp16_passes();
CudaPasses tf32_passes();  // fp32, products rounded to TF32
CudaPasses fp32_passes();  // fp32, three products of TF32 each

std::string merge_on_gpu(const MergeArgs&, bool teacher, const Launch&);

}  // namespace tinyclip::contrastive
