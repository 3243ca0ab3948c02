// For any processor: SSE2 on x86-64, NEON on aarch64.
#define TC_VECTOR_BYTES 16
#include "contrastive/cpu_rows.h"
//
#include "contrastive/cpu_kernels.h"

namespace tinyclip::contrastive {

const KernelSet kBaselineKernels = TC_KERNEL_SET;

}  // namespace tinyclip::contrastive
