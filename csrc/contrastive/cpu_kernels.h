// The work of one thread as function pointers, one table for each instruction set.
#pragma once

#include "contrastive/cpu.h"

namespace tinyclip::contrastive {

template <class T>
struct Kernels {
  void (*stats)(const Problem<T>&, const Tile<T>&, Index begin, Index end, const Table<T>& columns);
  void (*merge)(const Problem<T>&, const Tile<T>&, const Table<T>* blocks, Index count, Index begin,
                Index end);
  void (*pull)(const Problem<T>&, const Tile<T>&, const Table<T>& columns);
  // With rows and columns, rows alone, columns alone.
  double (*grads[3])(const Problem<T>&, const Tile<T>&, const Table<T>& columns, Index begin,
                     Index end);
};

// [with a teacher]; defined by cpu_baseline.cpp, cpu_avx2.cpp and cpu_avx512.cpp.
struct KernelSet {
  Kernels<float> single[2];
  Kernels<double> twice[2];
};
extern const KernelSet kBaselineKernels;
#ifdef __x86_64__
extern const KernelSet kAvx2Kernels, kAvx512Kernels;
#endif

// The table of the including file's instruction set, after contrastive/cpu_rows.h.
#define TC_KERNELS(T, Teacher)                                                         \
  {                                                                                    \
    &stats_block<Teacher, T>, &merge_columns<Teacher, T>, &pull_columns<Teacher, T>, { \
      &grads_block<true, true, Teacher, T>, &grads_block<true, false, Teacher, T>,     \
          &grads_block<false, true, Teacher, T>                                        \
    }                                                                                  \
  }
#define TC_KERNEL_SET                                      \
  {                                                        \
    {TC_KERNELS(float, false), TC_KERNELS(float, true)}, { \
      TC_KERNELS(double, false), TC_KERNELS(double, true)  \
    }                                                      \
  }

}  // namespace tinyclip::contrastive
