// The contrastive problem as every target sees it: shapes, positions, weights. No device, no torch.
//
// S = scale * A * transpose(B) has M rows and N columns; the positive of row i is column offset +
// i. A pass walks S in tiles and keeps five numbers a row and a column (epilogue.h).
#pragma once

#include "target.h"

namespace tinyclip::contrastive {

enum StatName { kMax, kSum, kTeacherMax, kTeacherSum, kCross, kStats };

// The five numbers of many rows or columns: one array each, `stride` apart.
template <class T>
struct Table {
  T* base = nullptr;
  Index stride = 0;

  TC_HD T* at(StatName name, Index index) const { return base + name * stride + index; }
};

// The rows of S, or its columns.
template <class T>
struct Side {
  Index size = 0;
  Table<T> stats;
  const T* weight = nullptr;  // of each cross-entropy in the loss; null switches the side off
  Index weight_stride = 0;    // 0: one weight for all

  T weight_of(Index index) const { return weight[index * weight_stride]; }
};

template <class T>
struct Problem {
  Side<T> rows, columns;
  Index offset = 0;
  T* positive = nullptr;  // (M,): S[i, offset + i], from pass 1
  T scale = 1;
  T teacher_scale = 1;
  T alpha = 0;  // targets are (1 - alpha) positive + alpha softmax(teacher)
};

// S[row : row + height, column : column + width], as cosines: the scales are applied on reading,
// in both passes alike, so that both see the same bits. Pass 2 leaves dS where the cosines were.
template <class T>
struct Tile {
  Index row = 0, column = 0, height = 0, width = 0;
  Matrix<T> logits;
  Matrix<const T> teacher;  // data is null without a teacher

  // Where in row i of the tile its positive lies: outside [0, width) if in another tile.
  Index positive(Index offset, Index i) const { return offset + row + i - column; }
};

}  // namespace tinyclip::contrastive
