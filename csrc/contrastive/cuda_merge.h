// The program that folds the tiles' partial statistics into those of whole rows and columns.
#pragma once

#include "contrastive/cuda_layout.h"

namespace tinyclip::contrastive {

// Folds parts 0, 1, ... of one row or column into its running statistics.
template <class Machine, bool Teacher>
TC_DEVICE void merge_parts(const MergeArgs& args) {
  const Index at = Machine::block() * kMergeThreads + Machine::thread();
  if (at >= args.size) return;
  const typename Machine::Exp exp;
  Stat<float> into{Lowest<float>::value, 0, Lowest<float>::value, 0, 0};
  const Table<float>& table = args.into;
  if (!args.first) {
    into.m = *table.at(kMax, at);
    into.l = *table.at(kSum, at);
    if (Teacher) {
      into.m_t = *table.at(kTeacherMax, at);
      into.l_t = *table.at(kTeacherSum, at);
      into.u = *table.at(kCross, at);
    }
  }
  for (Index k = 0; k < args.count; ++k) {
    const float* part = args.parts.of(k, Teacher ? kStats : 2) + at;
    const Index length = args.parts.length;
    Stat<float> from{part[kMax * length], part[kSum * length], 0, 0, 0};
    if (Teacher) {
      from.m_t = part[kTeacherMax * length];
      from.l_t = part[kTeacherSum * length];
      from.u = part[kCross * length];
    }
    merge<Teacher>(into, from, exp);
  }
  *table.at(kMax, at) = into.m;
  *table.at(kSum, at) = into.l;
  if (Teacher) {
    *table.at(kTeacherMax, at) = into.m_t;
    *table.at(kTeacherSum, at) = into.l_t;
    *table.at(kCross, at) = into.u;
  }
}

}  // namespace tinyclip::contrastive
