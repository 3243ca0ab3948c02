// What all of csrc is written in: which target a function is for, in a word before it, and sizes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TC_HD __host__ __device__ __forceinline__
#define TC_DEVICE __device__ __forceinline__
#else
// Never a symbol of its own: each file that includes this may be compiled for another processor.
#define TC_HD __attribute__((always_inline)) inline
#define TC_DEVICE inline  // on a host only where it plays a GPU
#endif

namespace tinyclip {

using Index = std::int64_t;  // M * N passes 2^31 at M = N = 46,341

// Rows at a stride; elements of a row are adjacent. Strides count elements.
template <class T>
struct Matrix {
  T* data = nullptr;
  Index stride = 0;

  TC_HD T* at(Index row, Index column) const { return data + row * stride + column; }
};

}  // namespace tinyclip
