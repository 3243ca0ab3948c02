// The program of one tile: features to products on tensor cores, and the two epilogues.
//
// Written against a Machine, which has the instructions: cuda_isa.h is the GPU's, and the tests
// bring one that executes them on the host, so that all that is here runs without a GPU.
#pragma once

#include "contrastive/cuda_layout.h"

namespace tinyclip::contrastive {

template <class Machine, class Products, bool Teacher>
struct TileProgram {
  using At = typename Products::At;
  using Sums = typename Products::Sums;
  using Exp = typename Machine::Exp;
  static constexpr int kColumns = At::kColumns;

  // One step along D of `Rows` rows, zeros beyond the panel and beyond D.
  template <int Rows>
  TC_DEVICE static void load(char* into, const Features& from, Index first, Index size,
                             Index step) {
    const int thread = Machine::thread();
#pragma unroll
    for (int n = 0; n < Rows * 8 / kThreads; ++n) {
      const int row = n * (kThreads / 8) + thread / 8, chunk = thread % 8;
      const Index byte = step * kStepBytes + chunk * 16;
      const bool real = first + row < size && byte < from.depth;
      const char* source = real ? from.data + (first + row) * from.stride + byte : from.data;
      Machine::copy16(into + swizzled(row, chunk), source, real);
    }
  }

  // The cosines of the tile at (row, column) of the panel, and the teacher's.
  TC_DEVICE static void multiply(const PanelArgs& panel, Index row, Index column, char* shared,
                                 Sums& sums, Sums& teacher) {
    const Index own = ceil_div(panel.a.depth, kStepBytes);
    const Index all = own + (Teacher ? ceil_div(panel.ta.depth, kStepBytes) : 0);
    const auto stage = [&](Index step) { return shared + step % kStages * stage_bytes(Teacher); };
    const auto ask = [&](Index step) {
      if (step < all) {
        const bool its = Teacher && step >= own;
        const Index along = its ? step - own : step;
        char* into = stage(step);
        load<kTileRows>(into, its ? panel.ta : panel.a, row, panel.height, along);
        load<kColumns>(into + kTileRows * kStepBytes, its ? panel.tb : panel.b, column, panel.width,
                       along);
      }
      Machine::copies_commit();
    };
    const auto consume = [&](Index step, Sums& into) {
      Machine::copies_wait();
      Machine::publish();
      Machine::sync();  // the step is there, and the one before it is used up
      const char* a = stage(step);
      const char* b = a + kTileRows * kStepBytes;
      Products::begin(into, a, b);
      ask(step + kStages - 1);
      Products::finish(into, a, b);
    };
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) ask(step);
    for (Index step = 0; step < own; ++step) consume(step, sums);
    if (Teacher)
      for (Index step = own; step < all; ++step) consume(step, teacher);
    Machine::sync();  // nobody reads the stages any more
  }

  TC_DEVICE static void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < At::kM; ++i)
#pragma unroll
      for (int j = 0; j < At::kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
  }

  // ---- pass 1 ----

  // Statistics along one side. Of a thread, `Many` rows (columns) of `Each` logits; the lanes that
  // share one differ in the bits of `Lanes`, the warps that share one are `Groups`.
  template <int Many, int Each, int Lanes, int Groups, class S, class Index_>
  TC_DEVICE static void reduce(const S& at, const S& teacher_at, const Index_& index, int group,
                               int extent, bool leader, char* shared, const Parts& parts,
                               Index tile, Index first, Index size) {
    const Exp exp;
    float* maxima = reinterpret_cast<float*>(shared);  // (2, Groups, 128)
    float* sums = maxima + 2 * Groups * 128;           // (3, Groups, 128)
    const auto slot = [](float* base, int number, int group, int index) -> float& {
      return base[(number * Groups + group) * 128 + index];
    };
#pragma unroll
    for (int r = 0; r < Many; ++r) {
      float m = at(r, 0), m_t = Teacher ? teacher_at(r, 0) : 0;
#pragma unroll
      for (int k = 1; k < Each; ++k) {
        m = larger(at(r, k), m);
        if (Teacher) m_t = larger(teacher_at(r, k), m_t);
      }
#pragma unroll
      for (int bit = 1; bit < 32; bit <<= 1)
        if (Lanes & bit) {
          m = larger(Machine::shuffle_xor(m, bit), m);
          if (Teacher) m_t = larger(Machine::shuffle_xor(m_t, bit), m_t);
        }
      if (leader) {
        slot(maxima, 0, group, index(r)) = m;
        if (Teacher) slot(maxima, 1, group, index(r)) = m_t;
      }
    }
    Machine::sync();
    const auto largest = [&](int number, int index) {
      float m = slot(maxima, number, 0, index);
#pragma unroll
      for (int g = 1; g < Groups; ++g) m = larger(slot(maxima, number, g, index), m);
      return m;
    };
#pragma unroll
    for (int r = 0; r < Many; ++r) {
      Stat<float> stat{largest(0, index(r)), 0, Teacher ? largest(1, index(r)) : 0, 0, 0};
#pragma unroll
      for (int k = 0; k < Each; ++k)
        add<Teacher>(stat, at(r, k), Teacher ? teacher_at(r, k) : 0, exp);
#pragma unroll
      for (int bit = 1; bit < 32; bit <<= 1)
        if (Lanes & bit) {
          stat.l += Machine::shuffle_xor(stat.l, bit);
          if (Teacher) {
            stat.l_t += Machine::shuffle_xor(stat.l_t, bit);
            stat.u += Machine::shuffle_xor(stat.u, bit);
          }
        }
      if (leader) {
        slot(sums, 0, group, index(r)) = stat.l;
        if (Teacher) {
          slot(sums, 1, group, index(r)) = stat.l_t;
          slot(sums, 2, group, index(r)) = stat.u;
        }
      }
    }
    Machine::sync();
    const int own = Machine::thread();
    if (own < extent && first + own < size) {
      const auto total = [&](int number) {
        float sum = slot(sums, number, 0, own);
        for (int g = 1; g < Groups; ++g) sum += slot(sums, number, g, own);
        return sum;
      };
      float* part = parts.of(tile, Teacher ? kStats : 2) + first + own;
      part[kMax * parts.length] = largest(0, own);
      part[kSum * parts.length] = total(0);
      if (Teacher) {
        part[kTeacherMax * parts.length] = largest(1, own);
        part[kTeacherSum * parts.length] = total(1);
        part[kCross * parts.length] = total(2);
      }
    }
    Machine::sync();
  }

  TC_DEVICE static void stats(const StatsArgs& args, char* shared) {
    const PanelArgs& panel = args.panel;
    const int thread = Machine::thread(), lane = thread % 32;
    const Index across = panel.tiles_across(Teacher);
    const Index down = Machine::block() / across, along = Machine::block() % across;
    const Index row = down * kTileRows, column = along * kColumns;
    Sums s, t;
    clear(s);
    if (Teacher) clear(t);
    multiply(panel, row, column, shared, s, t);
    const float scale = *panel.scale, t_scale = Teacher ? *panel.t_scale : 0;
#pragma unroll
    for (int i = 0; i < At::kM; ++i)
#pragma unroll
      for (int j = 0; j < At::kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Index r = row + At::row(thread, i, e / 2);
          const Index c = column + At::column(thread, j, e % 2);
          const bool real = r < panel.height && c < panel.width;
          s[i][j][e] = real ? Machine::times(scale, s[i][j][e]) : Lowest<float>::value;
          if (Teacher)
            t[i][j][e] = real ? Machine::times(t_scale, t[i][j][e]) : Lowest<float>::value;
          if (real && r + panel.diagonal == c) args.positive[r] = s[i][j][e];
        }
    const auto row_of = [&](int r) { return At::row(thread, r / 2, r % 2); };
    const auto column_of = [&](int r) { return At::column(thread, r / 2, r % 2); };
    {
      const auto at = [](Sums& x) {
        return [&x](int r, int k) { return x[r / 2][k / 2][r % 2 * 2 + k % 2]; };
      };
      reduce<At::kM * 2, At::kN * 2, 3, At::kWarpsN>(
          at(s), at(t), row_of, thread / 32 % At::kWarpsN, kTileRows, lane % 4 == 0, shared,
          args.rows, along, row, panel.height);
    }
    {
      const auto at = [](Sums& x) {
        return [&x](int r, int k) { return x[k / 2][r / 2][k % 2 * 2 + r % 2]; };
      };
      reduce<At::kN * 2, At::kM * 2, 28, At::kWarpsM>(
          at(s), at(t), column_of, thread / 32 / At::kWarpsN, kColumns, lane < 4, shared,
          args.columns, down, column, panel.width);
    }
  }

  // ---- pass 2 ----

  // How a row or column pulls, in shared memory: arrays of 256, rows first, then columns.
  enum PullName { kM, kPerExp, kMt, kPerExpT, kL, kLt };

  TC_DEVICE static void prepare(const GradsArgs& args, float* pulls, Index row, Index column) {
    const int own = Machine::thread();
    const bool rows = own < kTileRows;
    if (!rows && own - kTileRows >= kColumns) return;
    const Index at = rows ? row + own : column + own - kTileRows;
    float m = 0, per_exp = 0, m_t = 0, per_exp_t = 0, l = 1, l_t = 1;
    if (at < (rows ? args.panel.height : args.panel.width)) {
      const Table<const float>& table = rows ? args.rows : args.columns;
      const float weight = rows ? args.row_weight[at] : args.column_weight[at];
      m = *table.at(kMax, at);
      l = *table.at(kSum, at);
      per_exp = weight / l;
      if (Teacher) {
        m_t = *table.at(kTeacherMax, at);
        l_t = *table.at(kTeacherSum, at);
        per_exp_t = args.alpha * (weight / l_t);
      }
    }
    pulls[kM * 256 + own] = m;
    pulls[kPerExp * 256 + own] = per_exp;
    pulls[kL * 256 + own] = l;
    if (Teacher) {
      pulls[kMt * 256 + own] = m_t;
      pulls[kPerExpT * 256 + own] = per_exp_t;
      pulls[kLt * 256 + own] = l_t;
    }
  }

  TC_DEVICE static Pull<float> pull_of(const float* pulls, int at) {
    Pull<float> pull{pulls[kM * 256 + at], 0, pulls[kPerExp * 256 + at], 0};
    if (Teacher) {
      pull.m_t = pulls[kMt * 256 + at];
      pull.per_exp_t = pulls[kPerExpT * 256 + at];
    }
    return pull;
  }

  TC_DEVICE static float positive_pull(const float* pulls, int at, float s, float t) {
    return at_positive<Teacher>(pull_of(pulls, at), pulls[kL * 256 + at],
                                Teacher ? pulls[kLt * 256 + at] : 1, s, t,
                                typename Machine::Expm1());
  }

  template <class Element>
  TC_DEVICE static void grads(const GradsArgs& args, char* shared) {
    const PanelArgs& panel = args.panel;
    const int thread = Machine::thread();
    const Index across = panel.tiles_across(Teacher);
    const Index row = Machine::block() / across * kTileRows;
    const Index column = Machine::block() % across * kColumns;
    Sums s, t;
    clear(s);
    if (Teacher) clear(t);
    multiply(panel, row, column, shared, s, t);
    float* pulls = reinterpret_cast<float*>(shared);
    float* warp_sums = pulls + 6 * 256;
    prepare(args, pulls, row, column);
    Machine::sync();

    const float scale = *panel.scale, t_scale = Teacher ? *panel.t_scale : 0;
    const Exp exp;
    constexpr int kStagedRow = staged_row_bytes(Teacher, Element::kBytes);
    float dscale = 0;
    Pull<float> of_row[At::kM][2];
#pragma unroll
    for (int i = 0; i < At::kM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        of_row[i][half] = pull_of(pulls, At::row(thread, i, half));
#pragma unroll
    for (int j = 0; j < At::kN; ++j) {
      const int c = At::column(thread, j, 0);
      const Pull<float> of_column[2] = {pull_of(pulls, kTileRows + c),
                                        pull_of(pulls, kTileRows + c + 1)};
#pragma unroll
      for (int i = 0; i < At::kM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = At::row(thread, i, half);
          float ds[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float cosine = s[i][j][2 * half + e];
            const float logit = Machine::times(scale, cosine);
            const float its = Teacher ? Machine::times(t_scale, t[i][j][2 * half + e]) : 0;
            const Index r_panel = row + r, c_panel = column + c + e;
            ds[e] = away<Teacher>(of_row[i][half], logit, its, exp) +
                    away<Teacher>(of_column[e], logit, its, exp);
            if (r_panel + panel.diagonal == c_panel)
              ds[e] = positive_pull(pulls, r, logit, its) +
                      positive_pull(pulls, kTileRows + c + e, logit, its);
            // Beyond the panel a logit is 0, and e^(0 - m) anything.
            if (r_panel >= panel.height || c_panel >= panel.width) ds[e] = 0;
            dscale += ds[e] * cosine;
          }
          Machine::store_pair(Element(), shared + kPullBytes + r * kStagedRow + c * Element::kBytes,
                              ds[0], ds[1]);
        }
    }
#pragma unroll
    for (int bit = 16; bit > 0; bit >>= 1) dscale += Machine::shuffle_xor(dscale, bit);
    if (thread % 32 == 0) warp_sums[thread / 32] = dscale;
    Machine::sync();

    constexpr int kChunks = kColumns * Element::kBytes / 16;
    char* into = args.ds + row * args.ds_stride + column * Element::kBytes;
    for (int n = thread; n < kTileRows * kChunks; n += kThreads) {
      const int r = n / kChunks, chunk = n % kChunks;
      Machine::move16(into + r * args.ds_stride + chunk * 16,
                      shared + kPullBytes + r * kStagedRow + chunk * 16);
    }
    if (thread == 0) {
      float sum = warp_sums[0];
      for (int w = 1; w < kThreads / 32; ++w) sum += warp_sums[w];
      args.dscale[Machine::block()] = sum;
    }
  }
};

}  // namespace tinyclip::contrastive
