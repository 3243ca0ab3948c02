// For x86-64 processors with AVX2. The standard headers come first: what they define inline must
// stay callable on any processor.
#ifdef __x86_64__
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "contrastive/cpu_kernels.h"

#pragma GCC target("avx2")
#define TC_VECTOR_BYTES 32
#include "contrastive/cpu_rows.h"

namespace tinyclip::contrastive {

const KernelSet kAvx2Kernels = TC_KERNEL_SET;

}  // namespace tinyclip::contrastive
#endif
