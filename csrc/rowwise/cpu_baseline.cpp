// For any processor: SSE2 on x86-64, NEON on aarch64.
#define TC_VECTOR_BYTES 16
#include "rowwise/cpu_activation.h"
#include "rowwise/cpu_kernels.h"
#include "rowwise/cpu_layer_norm.h"

namespace tinyclip::rowwise {

const KernelSet kBaselineKernels = TC_KERNEL_SET;

}  // namespace tinyclip::rowwise
