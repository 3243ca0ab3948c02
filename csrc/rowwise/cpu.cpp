#include "rowwise/cpu.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

#include "rowwise/cpu_kernels.h"

namespace tinyclip::rowwise {
namespace {

constexpr Index kMostBlocks = 32, kFewestRows = 16;
constexpr Index kWorthAThread = 1 << 15;  // numbers below which waking other threads costs more
constexpr Index kSumColumns = 256;        // a thread's share of the columns

template <class T>
const Kernels<T>& kernels(Isa isa) {
  const KernelSet& set = chosen(isa, TC_TABLES);
  if constexpr (sizeof(T) == sizeof(float)) {
    return set.single;
  } else {
    return set.twice;
  }
}

// [0, rows) in blocks, the same for any number of threads.
struct Blocks {
  Index rows, count, height;

  explicit Blocks(Index rows)
      : rows(rows), count(std::clamp<Index>(rows / kFewestRows, 1, kMostBlocks)) {
    height = (rows + count - 1) / count;
    count = height == 0 ? 0 : (rows + height - 1) / height;
  }
  Index begin(Index b) const { return b * height; }
  Index end(Index b) const { return std::min((b + 1) * height, rows); }
};

int threads_for(Index rows, Index width, int threads) {
  return rows * width < kWorthAThread ? 1 : threads;
}

// work(begin, end, sums) for every block; what `sums` then holds, two arrays of `width` a block,
// is added up, in the blocks' order, to the outputs that are wanted.
template <class T, class Work>
void in_blocks(Index rows, Index width, T* first, T* second, int threads, Work work) {
  const Blocks blocks(rows);
  const bool wanted = first || second;
  const std::unique_ptr<T[]> sums(wanted ? new T[blocks.count * 2 * width] : nullptr);
#pragma omp parallel num_threads(threads_for(rows, width, threads))
  {
#pragma omp for schedule(static)
    for (Index b = 0; b < blocks.count; ++b) {
      T* own = wanted ? sums.get() + b * 2 * width : nullptr;
      if (own) std::fill_n(own, 2 * width, T(0));
      work(blocks.begin(b), blocks.end(b), own);
    }
    if (wanted) {
#pragma omp for schedule(static)
      for (Index begin = 0; begin < width; begin += kSumColumns) {
        const Index end = std::min(begin + kSumColumns, width);
        for (T* out : {first, second}) {
          if (!out) continue;
          std::fill(out + begin, out + end, T(0));
          const T* from = sums.get() + (out == second ? width : 0);
          for (Index b = 0; b < blocks.count; ++b)
            for (Index j = begin; j < end; ++j) out[j] += from[b * 2 * width + j];
        }
      }
    }
  }
}

// The channels of a problem, with the memory that they lie in.
template <class T>
struct Prepared {
  Channels<T> channels;
  std::vector<BitsOf<T>> bits;
  std::vector<T> weight, bias;

  Prepared(Index width, const T* given_weight, const T* given_bias, const bool* kept) {
    Index count = width;
    if (kept) {
      count = std::count(kept, kept + width, true);
      bits.resize(width);
      for (Index j = 0; j < width; ++j) bits[j] = kept[j] ? ~BitsOf<T>(0) : 0;
      channels.kept = bits.data();
    }
    channels.inverse = T(1) / static_cast<T>(std::max<Index>(count, 1));
    channels.weight = visible(weight, width, given_weight, T(1), kept);
    channels.bias = visible(bias, width, given_bias, T(0), kept);
  }

  static const T* visible(std::vector<T>& own, Index width, const T* given, T otherwise,
                          const bool* kept) {
    if (given && !kept) return given;
    own.assign(width, otherwise);
    if (given) std::copy(given, given + width, own.begin());
    for (Index j = 0; kept && j < width; ++j) own[j] = kept[j] ? own[j] : T(0);
    return own.data();
  }
};

}  // namespace

template <class T>
void layer_norm(const LayerNorm<T>& problem, int threads, Isa isa) {
  const Prepared<T> prepared(problem.width, problem.weight, problem.bias, problem.kept);
  const auto run = kernels<T>(isa).norm[problem.kept != nullptr];
  in_blocks<T>(problem.rows, problem.width, nullptr, nullptr, threads,
               [&](Index begin, Index end, T*) { run(problem, prepared.channels, begin, end); });
}

template <class T>
void layer_norm_grad(const LayerNormGrad<T>& problem, int threads, Isa isa) {
  const Prepared<T> prepared(problem.width, problem.weight, nullptr, problem.kept);
  const auto run = kernels<T>(isa).norm_grad[problem.kept != nullptr];
  in_blocks<T>(
      problem.rows, problem.width, problem.dweight, problem.dbias, threads,
      [&](Index begin, Index end, T* sums) { run(problem, prepared.channels, begin, end, sums); });
}

template <class T>
void activate(const Activate<T>& problem, Activation kind, int threads, Isa isa) {
  const auto run = kernels<T>(isa).activate[static_cast<int>(kind)];
  in_blocks<T>(problem.rows, problem.width, nullptr, nullptr, threads,
               [&](Index begin, Index end, T*) { run(problem, begin, end); });
}

template <class T>
void activate_grad(const ActivateGrad<T>& problem, Activation kind, int threads, Isa isa) {
  const auto run = kernels<T>(isa).activate_grad[static_cast<int>(kind)];
  in_blocks<T>(problem.rows, problem.width, problem.dbias, problem.dgate, threads,
               [&](Index begin, Index end, T* sums) { run(problem, begin, end, sums); });
}

#define TC_INSTANTIATE(T)                                              \
  template void layer_norm<T>(const LayerNorm<T>&, int, Isa);          \
  template void layer_norm_grad<T>(const LayerNormGrad<T>&, int, Isa); \
  template void activate<T>(const Activate<T>&, Activation, int, Isa); \
  template void activate_grad<T>(const ActivateGrad<T>&, Activation, int, Isa);
TC_INSTANTIATE(float)
TC_INSTANTIATE(double)

}  // namespace tinyclip::rowwise
