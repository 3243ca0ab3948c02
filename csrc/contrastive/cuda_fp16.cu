#include "contrastive/cuda_launch.h"

namespace tinyclip::contrastive {

CudaPasses fp16_passes() { return {PassesOf<Fp16>::stats, PassesOf<Fp16>::grads}; }

}  // namespace tinyclip::contrastive
