// For x86-64 processors with AVX-512. The standard headers come first: what they define inline must
// stay callable on any processor.
#ifdef __x86_64__
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "contrastive/cpu_kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#define TC_VECTOR_BYTES 64
#include "contrastive/cpu_rows.h"

namespace tinyclip::contrastive {

const KernelSet kAvx512Kernels = TC_KERNEL_SET;

}  // namespace tinyclip::contrastive
#endif
