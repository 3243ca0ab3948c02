#include "contrastive/cpu.h"

#include <algorithm>
#include <cmath>

#include "contrastive/cpu_kernels.h"
#include "contrastive/epilogue.h"

namespace tinyclip::contrastive {
namespace {

constexpr Index kMergeColumns = 256;      // a thread's share of the columns
constexpr Index kWorthAThread = 1 << 14;  // logits below which waking other threads costs more

Index blocks_of(Index height) { return (height + kBlockRows - 1) / kBlockRows; }

template <class T>
const Kernels<T>& kernels(Isa isa, bool teacher) {
  const KernelSet& set = chosen(isa, TC_TABLES);
  if constexpr (sizeof(T) == sizeof(float)) {
    return set.single[teacher];
  } else {
    return set.twice[teacher];
  }
}

template <class T>
int threads_for(const Tile<T>& tile, int threads) {
  return tile.height * tile.width < kWorthAThread ? 1 : threads;
}

template <class T>
T mean_loss(const Problem<T>& problem, bool teacher) {
  double total = 0;
  for (const Side<T>* side : {&problem.rows, &problem.columns})
    for (Index i = 0; i < side->size; ++i) {
      const Table<T>& at = side->stats;
      Stat<T> stat{*at.at(kMax, i), *at.at(kSum, i), 0, 1, 0};
      if (teacher) {
        stat.l_t = *at.at(kTeacherSum, i);
        stat.u = *at.at(kCross, i);
      }
      total +=
          cross_entropy(stat, problem.positive[i], problem.alpha, [](T x) { return std::log(x); });
    }
  return static_cast<T>(0.5 * total / static_cast<double>(problem.rows.size));
}

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

template <class T>
std::size_t workspace_bytes(Index height, Index width) {
  const std::size_t blocks = blocks_of(height), rows = height, columns = width;
  const std::size_t passes = blocks * (kStats * columns * sizeof(T) + sizeof(Table<T>));
  const std::size_t statistics = (kStats * (rows + columns) + rows) * sizeof(T);
  return aligned(statistics) + passes;
}

template <class T>
void stats(const Problem<T>& problem, const Tile<T>& tile, void* workspace, int threads, Isa isa) {
  const Index blocks = blocks_of(tile.height);
  if (blocks == 0 || tile.width == 0) return;
  const Kernels<T>& run = kernels<T>(isa, tile.teacher.data != nullptr);
  auto* tables = static_cast<Table<T>*>(workspace);
  auto* numbers = reinterpret_cast<T*>(tables + blocks);
  for (Index b = 0; b < blocks; ++b) tables[b] = {numbers + b * kStats * tile.width, tile.width};
  // Blocks, and so the order of every sum, are the same for any number of threads.
#pragma omp parallel num_threads(threads_for(tile, threads))
  {
#pragma omp for schedule(static)
    for (Index b = 0; b < blocks; ++b)
      run.stats(problem, tile, b * kBlockRows, std::min((b + 1) * kBlockRows, tile.height),
                tables[b]);
#pragma omp for schedule(static)
    for (Index j = 0; j < tile.width; j += kMergeColumns)
      run.merge(problem, tile, tables, blocks, j, std::min(j + kMergeColumns, tile.width));
  }
}

template <class T>
void grads(const Problem<T>& problem, const Tile<T>& tile, double* dscale, void* workspace,
           int threads, Isa isa) {
  const Index blocks = blocks_of(tile.height);
  if (blocks == 0 || tile.width == 0) return;
  const Kernels<T>& run = kernels<T>(isa, tile.teacher.data != nullptr);
  const bool rows = problem.rows.weight != nullptr, columns = problem.columns.weight != nullptr;
  auto* partial = static_cast<double*>(workspace);
  const Table<T> table{reinterpret_cast<T*>(partial + blocks), tile.width};
  if (columns) run.pull(problem, tile, table);
  const auto block = run.grads[!columns ? 1 : !rows ? 2 : 0];
#pragma omp parallel for schedule(static) num_threads(threads_for(tile, threads))
  for (Index b = 0; b < blocks; ++b)
    partial[b] =
        block(problem, tile, table, b * kBlockRows, std::min((b + 1) * kBlockRows, tile.height));
  for (Index b = 0; b < blocks; ++b) *dscale += partial[b];
}

template <class T>
void whole(Problem<T> problem, const Tile<T>& tile, T* loss, T* dscale, void* workspace,
           int threads, Isa isa) {
  const Index size = tile.height;
  T* numbers = static_cast<T*>(workspace);
  const T weight = T(0.5) / static_cast<T>(size);
  for (Side<T>* side : {&problem.rows, &problem.columns}) {
    *side = {size, {numbers, size}, &weight, 0};
    numbers += kStats * size;
  }
  problem.positive = numbers;
  // The scratch of the passes needs more alignment than the numbers before it have.
  numbers += size;
  auto* scratch = static_cast<char*>(workspace) +
                  aligned(reinterpret_cast<char*>(numbers) - static_cast<char*>(workspace));
  stats(problem, tile, scratch, threads, isa);
  *loss = mean_loss(problem, tile.teacher.data != nullptr);
  double total = 0;
  grads(problem, tile, &total, scratch, threads, isa);
  *dscale = static_cast<T>(total);
}

template std::size_t workspace_bytes<float>(Index, Index);
template std::size_t workspace_bytes<double>(Index, Index);
template void stats(const Problem<float>&, const Tile<float>&, void*, int, Isa);
template void stats(const Problem<double>&, const Tile<double>&, void*, int, Isa);
template void grads(const Problem<float>&, const Tile<float>&, double*, void*, int, Isa);
template void grads(const Problem<double>&, const Tile<double>&, double*, void*, int, Isa);
template void whole(Problem<float>, const Tile<float>&, float*, float*, void*, int, Isa);
template void whole(Problem<double>, const Tile<double>&, double*, double*, void*, int, Isa);

}  // namespace tinyclip::contrastive
