// How a kernel of this folder is launched: on its device and stream, with an error in words.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "contrastive/cuda.h"
#include "contrastive/cuda_isa.h"
#include "contrastive/cuda_products.h"
#include "contrastive/cuda_tile.h"
#include "device_guard.h"

namespace tinyclip::contrastive {
namespace {

// wgmma is code for sm_90a alone, and for fp32 would read operands that have to be split first.
template <class Element, bool Teacher>
struct ProductsOf {
  using type = MmaProducts<Gpu, Element, Teacher>;
};
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <bool Teacher>
struct ProductsOf<Bf16, Teacher> {
  using type = WgmmaProducts<Gpu, Bf16, Teacher>;
};
template <bool Teacher>
struct ProductsOf<Fp16, Teacher> {
  using type = WgmmaProducts<Gpu, Fp16, Teacher>;
};
#endif

// While one block multiplies, another one of its processor takes exponentials.
template <class Element>
constexpr int kBlocks = Element::kBytes == 2 ? 2 : 1;

extern __shared__ __align__(1024) char shared_memory[];

template <class Element, bool Teacher>
__global__ void __launch_bounds__(kThreads, kBlocks<Element>)
    contrastive_stats_kernel(const StatsArgs args) {
  using Products = typename ProductsOf<Element, Teacher>::type;
  TileProgram<Gpu, Products, Teacher>::stats(args, shared_memory);
}

template <class Element, bool Teacher>
__global__ void __launch_bounds__(kThreads, kBlocks<Element>)
    contrastive_grads_kernel(const GradsArgs args) {
  using Products = typename ProductsOf<Element, Teacher>::type;
  TileProgram<Gpu, Products, Teacher>::template grads<Element>(args, shared_memory);
}

template <class Args>
std::string launch(const char* name, void (*kernel)(Args), const Args& args, Index blocks,
                   int threads, int shared, const Launch& where) {
  const DeviceGuard guard(where.device);
  cudaError_t status = guard.status();
  if (status == cudaSuccess && shared > 0)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared,
             reinterpret_cast<cudaStream_t>(where.stream)>>>(args);
    status = cudaGetLastError();
  } else {
    cudaGetLastError();  // a refused launch must not turn up as the error of the next one
  }
  if (status == cudaSuccess) return "";
  return std::string(name) + " on cuda:" + std::to_string(where.device) + ": " +
         cudaGetErrorString(status);
}

template <class Element>
struct PassesOf {
  template <class Args>
  using Kernel = void (*)(Args);

  static std::string stats(const StatsArgs& args, bool teacher, const Launch& where) {
    const Kernel<StatsArgs> kernel = teacher ? contrastive_stats_kernel<Element, true>
                                             : contrastive_stats_kernel<Element, false>;
    return launch("contrastive_stats_kernel", kernel, args, args.panel.tiles(teacher), kThreads,
                  shared_bytes(teacher, Element::kBytes), where);
  }

  static std::string grads(const GradsArgs& args, bool teacher, const Launch& where) {
    const Kernel<GradsArgs> kernel = teacher ? contrastive_grads_kernel<Element, true>
                                             : contrastive_grads_kernel<Element, false>;
    return launch("contrastive_grads_kernel", kernel, args, args.panel.tiles(teacher), kThreads,
                  shared_bytes(teacher, Element::kBytes), where);
  }
};

}  // namespace
}  // namespace tinyclip::contrastive
