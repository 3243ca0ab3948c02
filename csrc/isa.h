// The instruction sets that the CPU code is compiled for; one is chosen when it is called.
#pragma once

namespace tinyclip {

enum class Isa { kBest, kBaseline, kAvx2, kAvx512 };

// Whether this build and this processor have it.
bool has(Isa isa);

// One that is there for kBest, else the one itself.
Isa resolved(Isa isa);

}  // namespace tinyclip
