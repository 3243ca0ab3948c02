// The activation of a block of rows on one thread, and its slope. Included once for each
// instruction set.
#pragma once

#include "rowwise/cpu_kernels.h"
#include "simd.h"

namespace tinyclip::rowwise {
namespace {

// The upper tail of the normal distribution over e^(-a^2 / 2), for a >= 0, as u P(2 a u) with
// u = 1 / (a + k): smooth in that variable out to infinity (the mapping of Shepherd and
// Laframboise, Math. Comp. 36, 1981). Our own fits, with relative errors of 2e-8 and 2e-15. Beyond
// `far` every activation is x or 0, to the last bit.
template <class T>
struct TailPlan;
template <>
struct TailPlan<float> {
  static constexpr float far = 60, k = 2.5f;
  static constexpr float kPoly[] = {-2.74658807e-05f,
                                    7.90596302e-05f,
                                    0.000238555158f,
                                    -0.000729073176f,
                                    6.75514994e-05f,
                                    -0.00311304283f,
                                    0.00279137221f,
                                    0.0366659129f,
                                    0.0423789594f,
                                    -0.621695173f,
                                    1.25f};
};
template <>
struct TailPlan<double> {
  static constexpr double far = 420, k = 3.5;
  static constexpr double kPoly[] = {2.0826063681395073e-09,
                                     -4.5031211787839273e-08,
                                     4.3927557292868711e-07,
                                     -2.5717494847206762e-06,
                                     1.0163342112864399e-05,
                                     -2.8979863233111977e-05,
                                     6.2226835035423617e-05,
                                     -0.00010316350101803811,
                                     0.00013379266910597959,
                                     -0.00013821160061816052,
                                     0.00011387678213445206,
                                     -6.6048885316531079e-05,
                                     4.8290940416445427e-05,
                                     -5.8154672291680529e-05,
                                     -0.00023445435854885699,
                                     -0.00011229479948253308,
                                     0.0026316412178795396,
                                     0.005878086097711956,
                                     -0.030075069044041655,
                                     -0.088788015386326344,
                                     0.67366603254373725,
                                     -1.5685214674588017,
                                     1.75};
};

template <class V>
struct ValueAndSlope {
  V value, slope;
};

// V is T or a vector of T. NaN stays NaN: of a comparison with it, the second branch is taken.
template <Activation Kind, class T, class V>
TC_HD ValueAndSlope<V> act_of(V x) {
  typedef TailPlan<T> Plan;
  const V zero{};
  if constexpr (Kind == Activation::kRelu) {
    return {x < zero ? zero : x, x > zero ? zero + 1 : zero};
  } else {
    const V low = x < zero - Plan::far ? zero - Plan::far : x;  // -inf times 0 is to be 0
    const V near = low > zero + Plan::far ? zero + Plan::far : low;
    const V a = near < zero ? -near : near;
    if constexpr (Kind == Activation::kGelu) {
      const V e = exponential<T>(a * a * T(-0.5));
      const V u = T(1) / (a + Plan::k), v = a * u * T(2);
      V poly = zero + Plan::kPoly[0];
      for (unsigned n = 1; n < sizeof(Plan::kPoly) / sizeof(T); ++n)
        poly = mul_add(poly, v, zero + Plan::kPoly[n]);
      const V tail = poly * u * e;
      const V share = x < zero ? tail : T(1) - tail;
      constexpr T kDensity = T(0.39894228040143267794);  // 1 / sqrt(2 pi)
      return {low * share, mul_add(near, e * kDensity, share)};
    } else {
      // x sigmoid(z): the tanh of GELU's approximation is 2 sigmoid(2 .) - 1.
      V z, rise;
      if constexpr (Kind == Activation::kGeluTanh) {
        constexpr T kTwice = T(1.5957691216057307117), kCube = T(0.044715);  // 2 sqrt(2 / pi)
        const V square = a * a;
        z = a * mul_add(square, zero + kCube, zero + T(1)) * kTwice;
        rise = mul_add(square, zero + 3 * kCube, zero + T(1)) * kTwice;
      } else {
        z = a * T(1.702);
        rise = zero + T(1.702);
      }
      const V e = exponential<T>(-z), over = T(1) / (e + T(1)), small = e * over;
      const V share = x < zero ? small : over;
      return {low * share, mul_add(near * rise, small * over, share)};
    }
  }
}

template <Activation Kind, class T>
TC_HD ValueAndSlope<T> act(T x) {
  return act_of<Kind, T, T>(x);
}
template <Activation Kind, class T>
TC_HD ValueAndSlope<Lanes<T>> act(const Lanes<T>& x) {
  ValueAndSlope<Lanes<T>> out;
  for (int k = 0; k < Lanes<T>::kParts; ++k) {
    const auto part = act_of<Kind, T, typename Lanes<T>::Part>(x.part[k]);
    out.value.part[k] = part.value;
    out.slope.part[k] = part.slope;
  }
  return out;
}

template <Activation Kind, class T>
void activate_rows(const Activate<T>& problem, Index begin, Index end) {
  const Index width = problem.width;
  for (Index i = begin; i < end; ++i) {
    const T* pre = problem.pre + i * width;
    T* hidden = problem.hidden + i * width;
    sweep<T>(0, width, [&](Index j, auto like) TC_LAMBDA {
      using V = decltype(like);
      will_read(pre + j);
      will_write(hidden + j);
      V value = act<Kind>(load<V>(pre + j)).value;
      if (problem.gate) value = value * load<V>(problem.gate + j);
      store(hidden + j, value);
    });
  }
}

template <Activation Kind, class T>
void activate_grad_rows(const ActivateGrad<T>& problem, Index begin, Index end, T* column_sums) {
  const Index width = problem.width;
  T *dbias = column_sums, *dgate = column_sums ? column_sums + width : nullptr;
  for (Index i = begin; i < end; ++i) {
    const T* pre = problem.pre + i * width;
    T* dhidden = problem.dhidden + i * width;
    T* hidden = problem.hidden ? problem.hidden + i * width : nullptr;
    sweep<T>(0, width, [&](Index j, auto like) TC_LAMBDA {
      using V = decltype(like);
      will_read(pre + j);
      will_write(dhidden + j);
      if (hidden) will_write(hidden + j);
      auto [value, slope] = act<Kind>(load<V>(pre + j));
      V g = load<V>(dhidden + j);
      if (problem.gate) {
        if (column_sums) store(dgate + j, load<V>(dgate + j) + g * value);
        const V gate = load<V>(problem.gate + j);
        value = value * gate;
        g = g * gate;
      }
      if (hidden) store(hidden + j, value);
      g = g * slope;
      if (column_sums) store(dbias + j, load<V>(dbias + j) + g);
      store(dhidden + j, g);
    });
  }
}

}  // namespace
}  // namespace tinyclip::rowwise
