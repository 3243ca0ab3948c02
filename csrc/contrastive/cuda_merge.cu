#include "contrastive/cuda_merge.h"

#include "contrastive/cuda_launch.h"

namespace tinyclip::contrastive {
namespace {

template <bool Teacher>
__global__ void __launch_bounds__(kMergeThreads) contrastive_merge_kernel(const MergeArgs args) {
  merge_parts<Gpu, Teacher>(args);
}

}  // namespace

std::string merge_on_gpu(const MergeArgs& args, bool teacher, const Launch& where) {
  const auto kernel = teacher ? contrastive_merge_kernel<true> : contrastive_merge_kernel<false>;
  return launch("contrastive_merge_kernel", kernel, args, ceil_div(args.size, kMergeThreads),
                kMergeThreads, 0, where);
}

}  // namespace tinyclip::contrastive
