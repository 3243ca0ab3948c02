// A block of a tile's rows, on one thread: their statistics or their gradients, rows and columns in
// one sweep. Included once for each instruction set (cpu_kernels.h).
#pragma once

#include <cmath>

#include "contrastive/cpu.h"
#include "contrastive/epilogue.h"
#include "simd.h"

namespace tinyclip::contrastive {
namespace {

template <bool Teacher, class V, class T>
TC_HD Stat<V> read(const Table<T>& table, Index at) {
  Stat<V> stat{load<V>(table.at(kMax, at)), load<V>(table.at(kSum, at)), V{}, V{}, V{}};
  if (Teacher) {
    stat.m_t = load<V>(table.at(kTeacherMax, at));
    stat.l_t = load<V>(table.at(kTeacherSum, at));
    stat.u = load<V>(table.at(kCross, at));
  }
  return stat;
}

template <bool Teacher, class V, class T>
TC_HD void write(const Table<T>& table, Index at, const Stat<V>& stat) {
  store(table.at(kMax, at), stat.m);
  store(table.at(kSum, at), stat.l);
  if (Teacher) {
    store(table.at(kTeacherMax, at), stat.m_t);
    store(table.at(kTeacherSum, at), stat.l_t);
    store(table.at(kCross, at), stat.u);
  }
}

// The maximum of a row of n logits, which count for the columns' maxima too.
template <class T>
T maximum(const T* row, Index n, T scale, T* columns) {
  Lanes<T> wide = splat<Lanes<T>>(Lowest<T>::value);
  T one = Lowest<T>::value;
  sweep<T>(0, n, [&](Index j, auto like) TC_LAMBDA {
    using V = decltype(like);
    V& so_far = pick<V>(wide, one);
    const V s = load<V>(row + j) * splat<V>(scale);
    so_far = larger(s, so_far);
    store(columns + j, larger(s, load<V>(columns + j)));
  });
  return larger(largest(wide), one);
}

// Adds a row, whose maxima `row` holds already, to its own statistics and to the columns'.
template <bool Teacher, class T>
void add_row(Stat<T>& row, const T* c, const T* c_t, const Problem<T>& problem,
             const Table<T>& columns) {
  using W = Lanes<T>;
  Stat<W> wide{splat<W>(row.m), W{}, splat<W>(row.m_t), W{}, W{}};
  sweep<T>(0, columns.stride, [&](Index j, auto like) TC_LAMBDA {
    using V = decltype(like);
    const V s = load<V>(c + j) * splat<V>(problem.scale);
    const V t = Teacher ? load<V>(c_t + j) * splat<V>(problem.teacher_scale) : s;
    add<Teacher>(pick<Stat<V>>(wide, row), s, t, Exp<T>());
    Stat<V> column = read<Teacher, V>(columns, j);
    add<Teacher>(column, s, t, Exp<T>());
    write<Teacher>(columns, j, column);
  });
  row.l += sum(wide.l);
  row.l_t += sum(wide.l_t);
  row.u += sum(wide.u);
}

// Rows [begin, end) of the tile into the problem's row statistics, and, into `columns`, the
// statistics of the tile's columns over these rows alone.
template <bool Teacher, class T>
void stats_block(const Problem<T>& problem, const Tile<T>& tile, Index begin, Index end,
                 const Table<T>& columns) {
  const Stat<T> nothing{Lowest<T>::value, 0, Lowest<T>::value, 0, 0};
  for (Index j = 0; j < tile.width; ++j) write<Teacher>(columns, j, nothing);
  Stat<T> rows[kBlockRows];
  for (Index i = begin; i < end; ++i) {
    Stat<T>& row = rows[i - begin] = nothing;
    row.m = maximum(tile.logits.at(i, 0), tile.width, problem.scale, columns.at(kMax, 0));
    if (Teacher)
      row.m_t = maximum(tile.teacher.at(i, 0), tile.width, problem.teacher_scale,
                        columns.at(kTeacherMax, 0));
  }
  for (Index i = begin; i < end; ++i) {
    Stat<T>& row = rows[i - begin];
    const T* c = tile.logits.at(i, 0);
    add_row<Teacher>(row, c, Teacher ? tile.teacher.at(i, 0) : c, problem, columns);
    const Index at = tile.row + i, positive = tile.positive(problem.offset, i);
    Stat<T> all = tile.column == 0 ? nothing : read<Teacher, T>(problem.rows.stats, at);
    merge<Teacher>(all, row, Exp<T>());
    write<Teacher>(problem.rows.stats, at, all);
    if (0 <= positive && positive < tile.width) problem.positive[at] = c[positive] * problem.scale;
  }
}

// Columns [begin, end) of the tile: what the blocks found of them, in the blocks' order, into the
// problem's column statistics.
template <bool Teacher, class T>
void merge_columns(const Problem<T>& problem, const Tile<T>& tile, const Table<T>* blocks,
                   Index count, Index begin, Index end) {
  const Table<T> total{problem.columns.stats.base + tile.column, problem.columns.stats.stride};
  const bool first = tile.row == 0;
  sweep<T>(begin, end, [&](Index j, auto like) TC_LAMBDA {
    using V = decltype(like);
    Stat<V> all = read<Teacher, V>(first ? blocks[0] : total, j);
    for (Index b = first; b < count; ++b)
      merge<Teacher>(all, read<Teacher, V>(blocks[b], j), Exp<T>());
    write<Teacher>(total, j, all);
  });
}

template <bool Teacher, class T>
Pull<T> pull_of(const Side<T>& side, const Stat<T>& stat, Index at, T alpha) {
  const T weight = side.weight_of(at);
  return {stat.m, stat.m_t, weight / stat.l, Teacher ? alpha * (weight / stat.l_t) : T(0)};
}

// What pass 2 reads of the tile's columns, once for all rows: Pull::per_exp and per_exp_t take the
// places of l and l_t.
template <bool Teacher, class T>
void pull_columns(const Problem<T>& problem, const Tile<T>& tile, const Table<T>& columns) {
  for (Index j = 0; j < tile.width; ++j) {
    const Index at = tile.column + j;
    Stat<T> stat = read<Teacher, T>(problem.columns.stats, at);
    const Pull<T> pull = pull_of<Teacher>(problem.columns, stat, at, problem.alpha);
    stat.l = pull.per_exp;
    stat.l_t = pull.per_exp_t;
    write<Teacher>(columns, j, stat);
  }
}

// dS at the positive, in column `positive` of row i of the tile.
template <bool Rows, bool Cols, bool Teacher, class T>
T positive_grad(const Problem<T>& problem, const Tile<T>& tile, Index i, Index positive) {
  const T s = *tile.logits.at(i, positive) * problem.scale;
  const T t = Teacher ? *tile.teacher.at(i, positive) * problem.teacher_scale : s;
  const auto side = [&](const Side<T>& side, Index at) {
    const Stat<T> stat = read<Teacher, T>(side.stats, at);
    const Pull<T> pull = pull_of<Teacher>(side, stat, at, problem.alpha);
    return at_positive<Teacher>(pull, stat.l, stat.l_t, s, t, [](T x) { return std::expm1(x); });
  };
  T grad = 0;
  if (Rows) grad += side(problem.rows, tile.row + i);
  if (Cols) grad += side(problem.columns, tile.column + positive);
  return grad;
}

// Rows [begin, end) of the tile: dS over the cosines; returns the sum of dS * cosine. `columns` is
// what pull_columns wrote.
template <bool Rows, bool Cols, bool Teacher, class T>
double grads_block(const Problem<T>& problem, const Tile<T>& tile, const Table<T>& columns,
                   Index begin, Index end) {
  using W = Lanes<T>;
  double dscale = 0;
  for (Index i = begin; i < end; ++i) {
    T* c = tile.logits.at(i, 0);
    const T* c_t = Teacher ? tile.teacher.at(i, 0) : c;
    const Index at = tile.row + i, positive = tile.positive(problem.offset, i);
    Pull<T> row{};
    if (Rows) {
      const Stat<T> stat = read<Teacher, T>(problem.rows.stats, at);
      row = pull_of<Teacher>(problem.rows, stat, at, problem.alpha);
    }
    Pull<W> row_wide{splat<W>(row.m), splat<W>(row.m_t), splat<W>(row.per_exp),
                     splat<W>(row.per_exp_t)};
    T own = 0;
    if (0 <= positive && positive < tile.width)
      own = positive_grad<Rows, Cols, Teacher>(problem, tile, i, positive);
    W product_wide{};
    T product = 0;
    sweep<T>(0, tile.width, [&](Index j, auto like) TC_LAMBDA {
      using V = decltype(like);
      constexpr Index kWidth = sizeof(V) / sizeof(T);
      const V cosine = load<V>(c + j), s = cosine * splat<V>(problem.scale);
      const V t = Teacher ? load<V>(c_t + j) * splat<V>(problem.teacher_scale) : s;
      V ds{};
      if (Rows) ds = away<Teacher>(pick<Pull<V>>(row_wide, row), s, t, Exp<T>());
      if (Cols) {
        const Stat<V> stat = read<Teacher, V>(columns, j);
        const V by_column =
            away<Teacher>(Pull<V>{stat.m, stat.m_t, stat.l, stat.l_t}, s, t, Exp<T>());
        ds = Rows ? ds + by_column : by_column;
      }
      store(c + j, ds);
      if (j <= positive && positive < j + kWidth) {
        c[positive] = own;
        ds = load<V>(c + j);
      }
      V& so_far = pick<V>(product_wide, product);
      so_far = so_far + ds * cosine;
    });
    dscale += product + sum(product_wide);
  }
  return dscale;
}

}  // namespace
}  // namespace tinyclip::contrastive
