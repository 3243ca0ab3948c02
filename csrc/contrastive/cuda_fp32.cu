#include "contrastive/cuda_launch.h"

namespace tinyclip::contrastive {

CudaPasses fp32_passes() { return {PassesOf<Fp32<true>>::stats, PassesOf<Fp32<true>>::grads}; }

}  // namespace tinyclip::contrastive
