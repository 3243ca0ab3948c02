// The engine on a CPU: what is done with a tile of cosines that a GEMM has left in memory.
#pragma once

#include <cstddef>

#include "contrastive/problem.h"
#include "isa.h"

namespace tinyclip::contrastive {

// A thread's share of a tile: few enough rows that a block stays in its cache between two sweeps,
// so many that merging the blocks' columns is nothing.
constexpr Index kBlockRows = 64;

// Bytes of scratch memory that any call on a tile of this extent needs, aligned to 64.
template <class T>
std::size_t workspace_bytes(Index height, Index width);

// Pass 1 of a tile. Tiles may come in any order in which those of column 0 and of row 0, which
// start the statistics of their rows and columns, come first.
template <class T>
void stats(const Problem<T>& problem, const Tile<T>& tile, void* workspace, int threads, Isa isa);

// Pass 2 of a tile: dS over the cosines; adds the sum of dS * cosine to `dscale`.
template <class T>
void grads(const Problem<T>& problem, const Tile<T>& tile, double* dscale, void* workspace,
           int threads, Isa isa);

// Both passes of a problem that is one tile: its loss, each half the mean over rows and over
// columns, dS of that loss over the cosines, and the sum of dS * cosine. M = N; of the problem,
// scales and alpha are read.
template <class T>
void whole(Problem<T> problem, const Tile<T>& tile, T* loss, T* dscale, void* workspace,
           int threads, Isa isa);

}  // namespace tinyclip::contrastive
