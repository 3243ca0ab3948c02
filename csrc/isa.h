// The instruction sets that the CPU code is compiled for; one is chosen when it is called.
#pragma once

namespace tinyclip {

enum class Isa { kBest, kBaseline, kAvx2, kAvx512 };

// Whether this build and this processor have it.
bool has(Isa isa);

// One that is there for kBest, else the one itself.
Isa resolved(Isa isa);

// The one of three tables that an instruction set reads, TC_TABLES being those in sight.
template <class Set>
const Set& chosen(Isa isa, const Set& baseline, const Set& avx2, const Set& avx512) {
  isa = resolved(isa);
  return isa == Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : baseline;
}
#ifdef __x86_64__
#define TC_TABLES kBaselineKernels, kAvx2Kernels, kAvx512Kernels
#else
#define TC_TABLES kBaselineKernels, kBaselineKernels, kBaselineKernels
#endif

}  // namespace tinyclip
