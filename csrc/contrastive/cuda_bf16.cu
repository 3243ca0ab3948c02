#include "contrastive/cuda_launch.h"

namespace tinyclip::contrastive {

CudaPasses bf16_passes() { return {PassesOf<Bf16>::stats, PassesOf<Bf16>::grads}; }

}  // namespace tinyclip::contrastive
