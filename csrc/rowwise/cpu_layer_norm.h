// LayerNorm of a block of rows on one thread. Included once for each instruction set.
#pragma once

#include <cmath>

#include "rowwise/cpu_kernels.h"
#include "simd.h"

namespace tinyclip::rowwise {
namespace {

// The value of channels from j on, with +0, whatever it is, where one is hidden.
template <bool Masked, class V, class T>
TC_HD V visible(V value, const Channels<T>& channels, Index j) {
  if constexpr (Masked) {
    return only<V>(value, channels.kept + j);
  } else {
    return value;
  }
}

template <bool Masked, class T>
void norm_rows(const LayerNorm<T>& problem, const Channels<T>& channels, Index begin, Index end) {
  const Index width = problem.width;
  for (Index i = begin; i < end; ++i) {
    const T* s = problem.x.at(i, 0);
    T *y = problem.y + i * width, sum[1];
    if (problem.residual.data) {
      const T *x = s, *residual = problem.residual.at(i, 0);
      T* total = problem.total + i * width;
      sums<T>(width, sum, [&](Index j, auto& sum) TC_LAMBDA {
        using V = std::decay_t<decltype(sum[0])>;
        will_read(x + j);
        will_read(residual + j);
        will_write(total + j);
        will_write(y + j);
        const V added = load<V>(x + j) + load<V>(residual + j);
        store(total + j, added);
        sum[0] = sum[0] + visible<Masked>(added, channels, j);
      });
      s = total;
    } else {
      sums<T>(width, sum, [&](Index j, auto& sum) TC_LAMBDA {
        using V = std::decay_t<decltype(sum[0])>;
        will_read(s + j);
        will_write(y + j);
        sum[0] = sum[0] + visible<Masked>(load<V>(s + j), channels, j);
      });
    }
    // What rounding left of the mean shows in the sum of differences from it, and is made up for
    // (Chan, Golub and LeVeque 1983, the corrected two-pass algorithm).
    const T rough = sum[0] * channels.inverse;
    T moments[2];
    sums<T>(width, moments, [&](Index j, auto& sum) TC_LAMBDA {
      using V = std::decay_t<decltype(sum[0])>;
      const V away = visible<Masked>(load<V>(s + j) - splat<V>(rough), channels, j);
      sum[0] = sum[0] + away;
      sum[1] = sum[1] + away * away;
    });
    const T rest = moments[0] * channels.inverse, mean = rough + rest;
    const T variance = moments[1] * channels.inverse - rest * rest;
    const T rstd = 1 / std::sqrt((variance < 0 ? 0 : variance) + problem.eps);
    problem.mean[i] = mean;
    problem.rstd[i] = rstd;
    sweep<T>(0, width, [&](Index j, auto like) TC_LAMBDA {
      using V = decltype(like);
      const V normed = (load<V>(s + j) - splat<V>(mean)) * splat<V>(rstd);
      const V value = normed * load<V>(channels.weight + j) + load<V>(channels.bias + j);
      store(y + j, visible<Masked>(value, channels, j));
    });
  }
}

template <bool Masked, class T>
void norm_grad_rows(const LayerNormGrad<T>& problem, const Channels<T>& channels, Index begin,
                    Index end, T* column_sums) {
  const Index width = problem.width;
  T *dweight = column_sums, *dbias = column_sums ? column_sums + width : nullptr;
  for (Index i = begin; i < end; ++i) {
    const T *dy = problem.dy.at(i, 0), *s = problem.total.at(i, 0);
    const T* dtotal = problem.dtotal.data ? problem.dtotal.at(i, 0) : nullptr;
    T* dx = problem.dx ? problem.dx + i * width : nullptr;
    const T mean = problem.mean[i], rstd = problem.rstd[i];
    const auto normed = [&](Index j, auto like) TC_LAMBDA {
      using V = decltype(like);
      const V value = (load<V>(s + j) - splat<V>(mean)) * splat<V>(rstd);
      return visible<Masked>(value, channels, j);
    };
    T both[2];
    sums<T>(width, both, [&](Index j, auto& sum) TC_LAMBDA {
      using V = std::decay_t<decltype(sum[0])>;
      will_read(dy + j);
      will_read(s + j);
      if (dtotal) will_read(dtotal + j);
      if (dx) will_write(dx + j);
      const V g = visible<Masked>(load<V>(dy + j), channels, j), n = normed(j, V{});
      if (column_sums) {
        store(dweight + j, load<V>(dweight + j) + g * n);
        store(dbias + j, load<V>(dbias + j) + g);
      }
      const V d = g * load<V>(channels.weight + j);
      sum[0] = sum[0] + d;
      sum[1] = sum[1] + d * n;
    });
    if (!dx) continue;
    const T mean_d = both[0] * channels.inverse, mean_dn = both[1] * channels.inverse;
    sweep<T>(0, width, [&](Index j, auto like) TC_LAMBDA {
      using V = decltype(like);
      const V d = load<V>(dy + j) * load<V>(channels.weight + j);
      const V away = d - splat<V>(mean_d) - normed(j, V{}) * splat<V>(mean_dn);
      V ds = visible<Masked>(away * splat<V>(rstd), channels, j);
      if (dtotal) ds = ds + load<V>(dtotal + j);
      store(dx + j, ds);
    });
  }
}

}  // namespace
}  // namespace tinyclip::rowwise
