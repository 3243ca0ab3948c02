// The algebra of one logit and of merging two partial statistics, once for every target.
//
// A softmax over logits s with targets (1 - alpha) positive + alpha softmax(t) needs five numbers:
//     m = max s    l = sum e^(s - m)    m_t = max t    l_t = sum e^(t - m_t)
//     u = sum e^(t - m_t) (s - m)
// hard cross-entropy = log l + (m - s_positive); soft = log l - u / l_t. docs/contrastive.md
// derives it. V is a number or a vector of them; what differs between targets (the exponential, the
// order of reductions) is handed in.
#pragma once

#include "target.h"

namespace tinyclip::contrastive {

template <class V>
struct Stat {
  V m, l, m_t, l_t, u;
};

// The maximum of no logits: finite, because -inf - -inf is not 0, and half of the lowest number,
// so that its distance to any logit is finite too.
template <class T>
struct Lowest;
template <>
struct Lowest<float> {
  static constexpr float value = -1.7e38f;
};
template <>
struct Lowest<double> {
  static constexpr double value = -8.9e307;
};

// A NaN never becomes the maximum; it reaches l, and from there every result.
template <class V>
TC_HD V larger(V a, V b) {
  return a > b ? a : b;
}

// One logit's share of a statistic that already holds its maxima.
template <bool Teacher, class V, class Exp>
TC_HD void add(Stat<V>& into, V s, V t, Exp exp) {
  const V centred = s - into.m;
  into.l = into.l + exp(centred);
  if (Teacher) {
    const V weight = exp(t - into.m_t);
    into.l_t = into.l_t + weight;
    into.u = into.u + weight * centred;
  }
}

// The statistics of two sets of logits taken together; u stays centred on the running maximum.
template <bool Teacher, class V, class Exp>
TC_HD void merge(Stat<V>& into, const Stat<V>& from, Exp exp) {
  const V m = larger(from.m, into.m);
  if (Teacher) {
    const V m_t = larger(from.m_t, into.m_t);
    const V ours = exp(into.m_t - m_t), theirs = exp(from.m_t - m_t);
    into.u =
        ours * (into.u + into.l_t * (into.m - m)) + theirs * (from.u + from.l_t * (from.m - m));
    into.l_t = ours * into.l_t + theirs * from.l_t;
    into.m_t = m_t;
  }
  into.l = exp(into.m - m) * into.l + exp(from.m - m) * from.l;
  into.m = m;
}

// (1 - alpha) hard + alpha soft of one row or column.
template <class T, class Log>
TC_HD T cross_entropy(const Stat<T>& stat, T positive, T alpha, Log log) {
  const T log_l = log(stat.l);
  T value = 0;
  if (alpha < 1) value = (1 - alpha) * (log_l + (stat.m - positive));
  if (alpha > 0) value = value + alpha * (log_l - stat.u / stat.l_t);
  return value;
}

// How a row or column of weight w pulls on its logits: with P = e^(s - m) / l,
// d(w cross-entropy) / ds = w (P - alpha P_t) away from the positive.
template <class V>
struct Pull {
  V m, m_t;
  V per_exp;    // w / l
  V per_exp_t;  // alpha w / l_t
};

template <bool Teacher, class V, class Exp>
TC_HD V away(const Pull<V>& pull, V s, V t, Exp exp) {
  const V student = pull.per_exp * exp(s - pull.m);
  return Teacher ? student - pull.per_exp_t * exp(t - pull.m_t) : student;
}

// At the positive: w ((P - 1) - alpha (P_t - 1)), where P - 1 = (expm1(s - m) + (1 - l)) / l keeps
// what is left of 1 - P when the model is sure.
template <bool Teacher, class T, class Expm1>
TC_HD T at_positive(const Pull<T>& pull, T l, T l_t, T s, T t, Expm1 expm1) {
  const T student = pull.per_exp * (expm1(s - pull.m) + (1 - l));
  return Teacher ? student - pull.per_exp_t * (expm1(t - pull.m_t) + (1 - l_t)) : student;
}

}  // namespace tinyclip::contrastive
