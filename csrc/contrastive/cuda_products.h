// One step along D of a tile's products, by each of the two kinds of tensor-core instructions.
#pragma once

#include "contrastive/cuda_layout.h"

namespace tinyclip::contrastive {

// Products by mma.sync: each warp reads its fragments from the stage.
template <class Machine, class Element, bool Teacher>
struct MmaProducts {
  using At = MmaLayout<Teacher>;
  using Sums = float[At::kM][At::kN][4];

  TC_DEVICE static void begin(Sums&, const char*, const char*) {}

  TC_DEVICE static void finish(Sums& sums, const char* a, const char* b) {
    const int thread = Machine::thread(), lane = thread % 32;
    const int row = At::warp_row(thread) + lane % 16;
    const int column = At::warp_column(thread) + lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kStepBytes / 32; ++k) {
      std::uint32_t of_a[At::kM][4], of_b[At::kN / 2][4];
#pragma unroll
      for (int i = 0; i < At::kM; ++i)
        Machine::load_matrices(of_a[i], a + swizzled(row + i * 16, 2 * k + lane / 16));
#pragma unroll
      for (int j = 0; j < At::kN / 2; ++j)
        Machine::load_matrices(of_b[j], b + swizzled(column + j * 16, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < At::kM; ++i)
#pragma unroll
        for (int j = 0; j < At::kN; ++j)
          Machine::mma(Element(), sums[i][j], of_a[i], &of_b[j / 2][j % 2 * 2]);
    }
  }
};

// Products by wgmma, which reads the stage itself while the next one is asked for.
template <class Machine, class Element, bool Teacher>
struct WgmmaProducts {
  using At = WgmmaLayout<Teacher>;
  using Sums = float[At::kM][At::kN][4];

  TC_DEVICE static void begin(Sums& sums, const char* a, const char* b) {
    a += Machine::thread() / 128 * 64 * kStepBytes;
    Machine::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStepBytes / 32; ++k)
      Machine::template wgmma<At::kColumns>(Element(), &sums[0][0][0], descriptor(a + k * 32),
                                            descriptor(b + k * 32));
    Machine::wgmma_commit();
  }

  TC_DEVICE static void finish(Sums&, const char*, const char*) { Machine::wgmma_wait(); }

  // Rows of 128 bytes, adjacent along D, in groups of eight 1,024 bytes apart, 128-byte swizzle.
  TC_DEVICE static std::uint64_t descriptor(const char* at) {
    const std::uint64_t address = Machine::shared_address(at);
    return (address & 0x3ffff) >> 4 | std::uint64_t{1} << 16 | std::uint64_t{1024 >> 4} << 32 |
           std::uint64_t{1} << 62;
  }
};

}  // namespace tinyclip::contrastive
