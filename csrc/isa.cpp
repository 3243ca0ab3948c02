#include "isa.h"

namespace tinyclip {

bool has(Isa isa) {
#ifdef __x86_64__
  if (isa == Isa::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::kBest || isa == Isa::kBaseline;
}

Isa resolved(Isa isa) {
  static const Isa best = has(Isa::kAvx512) ? Isa::kAvx512
                          : has(Isa::kAvx2) ? Isa::kAvx2
                                            : Isa::kBaseline;
  return isa == Isa::kBest ? best : isa;
}

}  // namespace tinyclip
