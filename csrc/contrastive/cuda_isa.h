// The GPU's instructions, one function each, as PTX names them.
#pragma once

#include <cuda_runtime.h>

#include "contrastive/cuda_elements.h"
#include "contrastive/cuda_layout.h"

namespace tinyclip::contrastive {

struct Gpu {
  TC_DEVICE static int thread() { return threadIdx.x; }
  TC_DEVICE static Index block() { return blockIdx.x; }
  TC_DEVICE static void sync() { __syncthreads(); }

  // A logit, rounded as a product: one fused with what is subtracted from it would be another
  // number in pass 2 than in pass 1, and P - 1 of a confident pair lives of their difference.
  TC_DEVICE static float times(float x, float y) { return __fmul_rn(x, y); }

  TC_DEVICE static float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffff, value, mask);
  }

  // Good to two units in the last place near 0, and to 2^-24 absolutely: the argument is at most 0.
  struct Exp {
    __device__ __forceinline__ float operator()(float x) const { return __expf(x); }
  };
  struct Expm1 {
    __device__ __forceinline__ float operator()(float x) const { return expm1f(x); }
  };

  TC_DEVICE static std::uint32_t shared_address(const void* at) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(at));
  }

  // 16 bytes to shared memory while the program goes on; zeros, and nothing read, unless real.
  TC_DEVICE static void copy16(char* into, const char* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(into)),
                 "l"(from), "r"(real ? 16 : 0)
                 : "memory");
  }
  TC_DEVICE static void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // All but the newest kStages - 2 groups have arrived, as far as this thread asked for them.
  TC_DEVICE static void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
  }

  // What this thread's copies wrote is to be seen by wgmma, whose reads go another way.
  TC_DEVICE static void publish() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }

  TC_DEVICE static void move16(char* into, const char* from) {
    *reinterpret_cast<uint4*>(into) = *reinterpret_cast<const uint4*>(from);
  }

  // Four 8 x 8 matrices of 16 bits: lane l gives the address of row l % 8 of matrix l / 8, and gets
  // the 32 bits of row l / 4 at l % 4 of each.
  TC_DEVICE static void load_matrices(std::uint32_t (&into)[4], const char* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(into[0]), "=r"(into[1]), "=r"(into[2]), "=r"(into[3])
                 : "r"(shared_address(from))
                 : "memory");
  }

#define TC_MMA(SHAPE_AND_TYPES)                                                   \
  asm volatile("mma.sync.aligned." SHAPE_AND_TYPES                                \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

  // sums (16 x 8) += a (16 x 32 bytes) b (32 bytes x 8)
  TC_DEVICE static void mma(Bf16, float (&sums)[4], const std::uint32_t* a,
                            const std::uint32_t* b) {
    TC_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
  TC_DEVICE static void mma(Fp16, float (&sums)[4], const std::uint32_t* a,
                            const std::uint32_t* b) {
    TC_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  }
  TC_DEVICE static void mma_tf32(float (&sums)[4], const std::uint32_t* a, const std::uint32_t* b) {
    TC_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef TC_MMA

  TC_DEVICE static std::uint32_t tf32(std::uint32_t x) {
    std::uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(x)));
    return rounded;
  }

  template <bool Whole>
  TC_DEVICE static void mma(Fp32<Whole>, float (&sums)[4], const std::uint32_t* a,
                            const std::uint32_t* b) {
    mma_fp32<Gpu, Whole>(sums, a, b);
  }
  TC_DEVICE static std::uint32_t less(std::uint32_t x, std::uint32_t y) {
    return __float_as_uint(__uint_as_float(x) - __uint_as_float(y));
  }

  TC_DEVICE static void store_pair(Bf16, char* into, float x, float y) {
    std::uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
    *reinterpret_cast<std::uint32_t*>(into) = both;
  }
  TC_DEVICE static void store_pair(Fp16, char* into, float x, float y) {
    std::uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
    *reinterpret_cast<std::uint32_t*>(into) = both;
  }
  template <bool Whole>
  TC_DEVICE static void store_pair(Fp32<Whole>, char* into, float x, float y) {
    *reinterpret_cast<float2*>(into) = float2{x, y};
  }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  TC_DEVICE static void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  TC_DEVICE static void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  TC_DEVICE static void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }

#define TC_F4(n) "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3])
#define TC_F16(n) TC_F4(n), TC_F4(n + 4), TC_F4(n + 8), TC_F4(n + 12)
#define TC_SUMS_32                                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TC_SUMS_64                                                                          \
  TC_SUMS_32                                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TC_WGMMA(TYPE)                                                                       \
  if constexpr (Columns == 128) {                                                            \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " " TC_SUMS_64 \
                 "}, %64, %65, 1, 1, 1, 0, 0;"                                               \
                 : TC_F16(0), TC_F16(16), TC_F16(32), TC_F16(48)                             \
                 : "l"(a), "l"(b));                                                          \
  } else {                                                                                   \
    static_assert(Columns == 64);                                                            \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " TC_SUMS_32  \
                 "}, %32, %33, 1, 1, 1, 0, 0;"                                               \
                 : TC_F16(0), TC_F16(16)                                                     \
                 : "l"(a), "l"(b));                                                          \
  }

  // d (64 x Columns, over four warps) += a (64 x 32 bytes) b (32 bytes x Columns)
  template <int Columns>
  TC_DEVICE static void wgmma(Bf16, float* d, std::uint64_t a, std::uint64_t b) {
    TC_WGMMA("bf16")
  }
  template <int Columns>
  TC_DEVICE static void wgmma(Fp16, float* d, std::uint64_t a, std::uint64_t b) {
    TC_WGMMA("f16")
  }
#undef TC_F4
#undef TC_F16
#undef TC_SUMS_32
#undef TC_SUMS_64
#undef TC_WGMMA
#endif
};

}  // namespace tinyclip::contrastive
