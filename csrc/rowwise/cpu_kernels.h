// The work of one thread as function pointers, one table for each instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "rowwise/cpu.h"

namespace tinyclip::rowwise {

template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;

// A mask as kernels read it, and the parameters with zeros where it hides a channel.
template <class T>
struct Channels {
  const BitsOf<T>* kept = nullptr;  // all bits, or none; null where no mask was given
  const T *weight = nullptr, *bias = nullptr;
  T inverse = 0;  // 1 / how many are kept
};

// Rows [begin, end). `sums` are the block's own column sums, zeroed: two arrays of `width`, or
// null.
template <class T>
struct Kernels {
  // [masked]
  void (*norm[2])(const LayerNorm<T>&, const Channels<T>&, Index begin, Index end);
  // [masked]: dweight, dbias
  void (*norm_grad[2])(const LayerNormGrad<T>&, const Channels<T>&, Index begin, Index end,
                       T* sums);
  // [kind]
  void (*activate[kActivations])(const Activate<T>&, Index begin, Index end);
  // [kind]: dbias, dgate
  void (*activate_grad[kActivations])(const ActivateGrad<T>&, Index begin, Index end, T* sums);
};

struct KernelSet {
  Kernels<float> single;
  Kernels<double> twice;
};
extern const KernelSet kBaselineKernels;
#ifdef __x86_64__
extern const KernelSet kAvx2Kernels, kAvx512Kernels;
#endif

// The table of the including file's instruction set, after cpu_layer_norm.h and cpu_activation.h.
#define TC_EACH_KIND(kernel, T)                                      \
  {&kernel<Activation::kGelu, T>, &kernel<Activation::kGeluTanh, T>, \
   &kernel<Activation::kQuickGelu, T>, &kernel<Activation::kRelu, T>}
#define TC_KERNELS(T)                                     \
  {{&norm_rows<false, T>, &norm_rows<true, T>},           \
   {&norm_grad_rows<false, T>, &norm_grad_rows<true, T>}, \
   TC_EACH_KIND(activate_rows, T),                        \
   TC_EACH_KIND(activate_grad_rows, T)}
#define TC_KERNEL_SET {TC_KERNELS(float), TC_KERNELS(double)}

}  // namespace tinyclip::rowwise
