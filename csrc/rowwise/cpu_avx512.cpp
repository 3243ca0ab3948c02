// For x86-64 processors with AVX-512. The standard headers come first: what they define inline must
// stay callable on any processor.
#ifdef __x86_64__
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rowwise/cpu_kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#define TC_FMA
#define TC_VECTOR_BYTES 64
#include "rowwise/cpu_activation.h"
#include "rowwise/cpu_layer_norm.h"

namespace tinyclip::rowwise {

const KernelSet kAvx512Kernels = TC_KERNEL_SET;

}  // namespace tinyclip::rowwise
#endif
