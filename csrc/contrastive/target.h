// Which target a function is for, in a word before it.
#pragma once

#ifdef __CUDACC__
#define TC_HD __host__ __device__ __forceinline__
#define TC_DEVICE __device__ __forceinline__
#else
// Never a symbol of its own: each file that includes this may be compiled for another processor.
#define TC_HD __attribute__((always_inline)) inline
#define TC_DEVICE inline  // on a host only where it plays a GPU
#endif
