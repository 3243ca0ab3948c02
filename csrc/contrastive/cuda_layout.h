// What a tile's program and its launch agree on: sizes, arguments, and where each element lies. No
// CUDA here: the host's tests compile the same maps.
//
// A block of 256 threads owns a tile of S, its rows over warps_m warps and its columns over
// warps_n. A warp holds the tile's products in fragments of 16 x 8, as mma.sync and wgmma both
// leave them: lane 4g + t has rows g and g + 8, columns 2t and 2t + 1 of each.
#pragma once

#include <cstddef>
#include <cstdint>

#include "contrastive/epilogue.h"
#include "contrastive/problem.h"

namespace tinyclip::contrastive {

constexpr int kThreads = 256;
constexpr int kTileRows = 128;
constexpr int kStages = 3;       // of features on their way, each a step along D
constexpr int kStepBytes = 128;  // of a row's features: one span of the swizzle
constexpr int kMergeThreads = 128;

// Of columns a tile has fewer with a teacher, whose products take as many registers again.
TC_HD constexpr int tile_columns(bool teacher) { return teacher ? 64 : 128; }

TC_HD constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

template <int WarpsM, int WarpsN, int FragmentsM, int FragmentsN>
struct Layout {
  static constexpr int kWarpsM = WarpsM, kWarpsN = WarpsN;
  static constexpr int kM = FragmentsM, kN = FragmentsN;
  static constexpr int kRows = WarpsM * FragmentsM * 16, kColumns = WarpsN * FragmentsN * 8;
  static_assert(WarpsM * WarpsN * 32 == kThreads && kRows == kTileRows);

  // First row and column of a warp.
  TC_HD static int warp_row(int thread) { return thread / 32 / WarpsN * FragmentsM * 16; }
  TC_HD static int warp_column(int thread) { return thread / 32 % WarpsN * FragmentsN * 8; }

  // Of element 2 half + e of fragment (i, j).
  TC_HD static int row(int thread, int i, int half) {
    return warp_row(thread) + i * 16 + half * 8 + thread % 32 / 4;
  }
  TC_HD static int column(int thread, int j, int e) {
    return warp_column(thread) + j * 8 + thread % 4 * 2 + e;
  }
};

// mma.sync reads least of shared memory where a warp's part is nearly square; wgmma gives a warp 16
// whole rows.
template <bool Teacher>
using MmaLayout = Layout<Teacher ? 4 : 2, Teacher ? 2 : 4, Teacher ? 2 : 4, 4>;
template <bool Teacher>
using WgmmaLayout = Layout<8, 1, 1, tile_columns(Teacher) / 8>;

// Where a row's 16-byte chunk lies in a stage: rows of 128 bytes, chunks exchanged so that eight
// rows of one chunk touch every bank once. It is the order wgmma calls the 128-byte swizzle.
TC_HD constexpr int swizzled(int row, int chunk) {
  return row * kStepBytes + ((chunk ^ (row & 7)) << 4);
}

// Shared memory: the stages, which the epilogue reuses.
TC_HD constexpr int stage_bytes(bool teacher) {
  return (kTileRows + tile_columns(teacher)) * kStepBytes;
}
constexpr int kPullBytes = 8192;  // six numbers of 256 rows and columns, and a sum a warp
TC_HD constexpr int staged_row_bytes(bool teacher, int element) {
  return tile_columns(teacher) * element + 16;  // so that eight rows touch different banks
}
TC_HD constexpr int shared_bytes(bool teacher, int element) {
  const int staged = kPullBytes + kTileRows * staged_row_bytes(teacher, element);
  const int stages = kStages * stage_bytes(teacher);
  return stages > staged ? stages : staged;
}

// Features of rows at a stride, counted in bytes; all three multiples of 16.
struct Features {
  const char* data = nullptr;
  Index stride = 0;
  Index depth = 0;
};

// A panel of S, as a kernel is told of it.
struct PanelArgs {
  Features a, b, ta, tb;
  const float* scale = nullptr;
  const float* t_scale = nullptr;
  Index height = 0, width = 0;
  Index diagonal = 0;  // the positive of row i is column diagonal + i

  TC_HD Index tiles_across(bool teacher) const { return ceil_div(width, tile_columns(teacher)); }
  TC_HD Index tiles(bool teacher) const {
    return ceil_div(height, kTileRows) * tiles_across(teacher);
  }
};

// Partial statistics: `numbers` arrays of `length` for each tile along the way.
struct Parts {
  float* data = nullptr;
  Index length = 0;

  TC_HD float* of(Index tile, int numbers) const { return data + tile * numbers * length; }
};

struct StatsArgs {
  PanelArgs panel;
  Parts rows, columns;
  float* positive = nullptr;
};

// dS is written in whole tiles: its memory reaches to the next multiple of a tile.
struct GradsArgs {
  PanelArgs panel;
  Table<const float> rows, columns;
  const float* row_weight = nullptr;
  const float* column_weight = nullptr;
  float alpha = 0;
  char* ds = nullptr;
  Index ds_stride = 0;  // in bytes
  float* dscale = nullptr;
};

struct MergeArgs {
  Parts parts;
  Index count = 0;  // of parts
  Table<float> into;
  Index size = 0;
  bool first = false;
};

}  // namespace tinyclip::contrastive
