#include "contrastive/cuda_launch.h"

namespace tinyclip::contrastive {

CudaPasses tf32_passes() { return {PassesOf<Fp32<false>>::stats, PassesOf<Fp32<false>>::grads}; }

}  // namespace tinyclip::contrastive
