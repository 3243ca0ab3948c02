// What features are made of, as names that a Machine's instructions are chosen by.
#pragma once

#include <cstdint>

#include "contrastive/cuda_layout.h"

namespace tinyclip::contrastive {

struct Bf16 {
  static constexpr int kBytes = 2;
};
struct Fp16 {
  static constexpr int kBytes = 2;
};
// Tensor cores read 19 bits of an fp32 number. Whole: its products are made of three of theirs.
template <bool Whole>
struct Fp32 {
  static constexpr int kBytes = 4;
};

// A product of fp32 fragments: with x = large + small, all of it but small * small.
template <class Machine, bool Whole>
TC_DEVICE void mma_fp32(float (&sums)[4], const std::uint32_t* a, const std::uint32_t* b) {
  std::uint32_t large_a[4], large_b[2], small_a[4], small_b[2];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    large_a[n] = Machine::tf32(a[n]);
    if (Whole) small_a[n] = Machine::tf32(Machine::less(a[n], large_a[n]));
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    large_b[n] = Machine::tf32(b[n]);
    if (Whole) small_b[n] = Machine::tf32(Machine::less(b[n], large_b[n]));
  }
  if (Whole) {
    Machine::mma_tf32(sums, small_a, large_b);
    Machine::mma_tf32(sums, large_a, small_b);
  }
  Machine::mma_tf32(sums, large_a, large_b);
}

}  // namespace tinyclip::contrastive
