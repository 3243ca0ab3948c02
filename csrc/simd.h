// Sixty-four bytes of numbers and their exponential, for the instruction set of the including file.
//
// TC_VECTOR_BYTES is the width of its registers. However wide they are, there are as many lanes and
// no operation is contracted but by mul_add, so every instruction set computes the same bits; with
// TC_FMA, every one that has it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "target.h"

namespace tinyclip {
namespace {

template <class T>
struct Lanes {
  typedef T Part __attribute__((vector_size(TC_VECTOR_BYTES)));
  static constexpr int kWidth = 64 / sizeof(T);
  static constexpr int kParts = 64 / TC_VECTOR_BYTES;
  Part part[kParts];
};

// What TC_HD is to a function: a lambda must be compiled for its caller's processor.
#define TC_LAMBDA __attribute__((always_inline))

template <class T, class F>
TC_HD Lanes<T> each(const Lanes<T>& a, const Lanes<T>& b, F f) {
  Lanes<T> out;
  for (int k = 0; k < Lanes<T>::kParts; ++k) out.part[k] = f(a.part[k], b.part[k]);
  return out;
}

template <class T>
TC_HD Lanes<T> operator+(const Lanes<T>& a, const Lanes<T>& b) {
  return each(a, b, [](auto x, auto y) TC_LAMBDA { return x + y; });
}
template <class T>
TC_HD Lanes<T> operator-(const Lanes<T>& a, const Lanes<T>& b) {
  return each(a, b, [](auto x, auto y) TC_LAMBDA { return x - y; });
}
template <class T>
TC_HD Lanes<T> operator*(const Lanes<T>& a, const Lanes<T>& b) {
  return each(a, b, [](auto x, auto y) TC_LAMBDA { return x * y; });
}
template <class T>
TC_HD Lanes<T> larger(const Lanes<T>& a, const Lanes<T>& b) {
  return each(a, b, [](auto x, auto y) TC_LAMBDA { return x > y ? x : y; });
}

// Below, V is a number or the lanes of many, and T the type of one.
// Register by register: a copy of all 64 bytes would pass through memory.
template <class V, class T>
TC_HD V load(const T* from) {
  V out;
  if constexpr (std::is_same_v<V, T>) {
    out = *from;
  } else {
    for (auto& part : out.part) {
      std::memcpy(&part, from, sizeof(part));
      from += sizeof(part) / sizeof(T);
    }
  }
  return out;
}

// Asks for what a loop over memory comes to some iterations later: where many instructions stand
// between two loads, a processor does not look that far by itself.
constexpr std::int64_t kAhead = 2048;  // bytes
template <class T>
TC_HD void will_read(const T* at) {
  __builtin_prefetch(at + kAhead / sizeof(T), 0);
}
template <class T>
TC_HD void will_write(const T* at) {
  __builtin_prefetch(at + kAhead / sizeof(T), 1);
}

template <class T, class V>
TC_HD void store(T* to, const V& value) {
  if constexpr (std::is_same_v<V, T>) {
    *to = value;
  } else {
    for (const auto& part : value.part) {
      std::memcpy(to, &part, sizeof(part));
      to += sizeof(part) / sizeof(T);
    }
  }
}
template <class V, class T>
TC_HD V splat(T value) {
  if constexpr (std::is_same_v<V, T>) {
    return value;
  } else {
    V out;
    for (auto& part : out.part) part = std::decay_t<decltype(part)>{} + value;
    return out;
  }
}

// step(j, V{}) over [begin, end): in whole lanes, then one by one.
template <class T, class Step>
TC_HD void sweep(Index begin, Index end, Step step) {
  constexpr Index kWidth = Lanes<T>::kWidth;
  Index j = begin;
  for (; j + kWidth <= end; j += kWidth) step(j, Lanes<T>{});
  for (; j < end; ++j) step(j, T{});
}
// The one of the two that has a step's type.
template <class V, class Wide, class One>
TC_HD V& pick(Wide& wide, One& one) {
  if constexpr (std::is_same_v<V, Wide>) {
    return wide;
  } else {
    return one;
  }
}

// Halves onto halves: one order for every width of register.
template <class T, class F>
TC_HD T reduce(const Lanes<T>& value, F f) {
  T lane[Lanes<T>::kWidth];
  store(lane, value);
  for (int half = Lanes<T>::kWidth / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lane[k] = f(lane[k], lane[k + half]);
  return lane[0];
}
template <class T>
TC_HD T sum(const Lanes<T>& value) {
  return reduce(value, [](T a, T b) TC_LAMBDA { return a + b; });
}
template <class T>
TC_HD T largest(const Lanes<T>& value) {
  return reduce(value, [](T a, T b) TC_LAMBDA { return a > b ? a : b; });
}

// add(j, sums) over [0, n), `sums` being `Count` numbers or lanes that it adds to. Two sets of
// lanes abreast: an addition waits for the one before it.
template <class T, int Count, class Add>
TC_HD void sums(Index n, T (&total)[Count], Add add) {
  constexpr Index kWidth = Lanes<T>::kWidth;
  Lanes<T> even[Count]{}, odd[Count]{};
  T one[Count]{};
  Index j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
    add(j, even);
    add(j + kWidth, odd);
  }
  if (j + kWidth <= n) {
    add(j, even);
    j += kWidth;
  }
  for (; j < n; ++j) add(j, one);
  for (int k = 0; k < Count; ++k) total[k] = sum(even[k] + odd[k]) + one[k];
}

template <class To, class From>
TC_HD To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The value where the mask's bits are all ones, +0 where they are zeros, whatever the value.
template <class V, class U>
TC_HD V only(const V& value, const U* mask) {
  if constexpr (std::is_arithmetic_v<V>) {
    return bits<V>(bits<U>(value) & *mask);
  } else {
    const Lanes<U> kept = load<Lanes<U>>(mask);
    V out;
    for (int k = 0; k < V::kParts; ++k)
      out.part[k] = bits<std::decay_t<decltype(out.part[k])>>(
          bits<std::decay_t<decltype(kept.part[k])>>(value.part[k]) & kept.part[k]);
    return out;
  }
}

// a * b + c, of numbers or of registers of them: rounded once in files that define TC_FMA, which
// the instruction set must then have, else twice.
#ifdef TC_FMA
TC_HD float mul_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
TC_HD double mul_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
typedef Lanes<float>::Part Floats;
typedef Lanes<double>::Part Doubles;
#if TC_VECTOR_BYTES == 64
TC_HD Floats mul_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
TC_HD Doubles mul_add(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
#else
TC_HD Floats mul_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
TC_HD Doubles mul_add(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
#endif
#else
template <class V>
TC_HD V mul_add(V a, V b, V c) {
  return a * b + c;
}
#endif

// e^x = 2^n e^r with n = round(x / ln 2), found by adding a number so large that only integers are
// left, and r = x - n ln 2 in two exact products. Zero below the smallest normal number.
template <class T>
struct ExpPlan;
template <>
struct ExpPlan<float> {
  using Bits = std::uint32_t;
  static constexpr Bits kMantissa = 23, kBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kFirst = -87.33654f, kLast = 88.0f;
  // (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2, highest power first (Cephes, Moshier 1989).
  static constexpr float kPoly[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                    4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};
template <>
struct ExpPlan<double> {
  using Bits = std::uint64_t;
  static constexpr Bits kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2e = 1.4426950408889634074;
  static constexpr double kLn2High = 0.693145751953125, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kFirst = -708.39, kLast = 709.0;
  // Taylor's: the first term left out is r^14 / 14! < 5e-18.
  static constexpr double kPoly[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800,
                                     1. / 362880,     1. / 40320,     1. / 5040,     1. / 720,
                                     1. / 120,        1. / 24,        1. / 6,        1. / 2};
};

// V is T or a vector of T, U the unsigned integers of its bits. NaN gives NaN, as no comparison
// with it holds.
template <class T, class V, class U>
TC_HD V exp_of(V x) {
  using Plan = ExpPlan<T>;
  const V zero{}, first = zero + Plan::kFirst, last = zero + Plan::kLast;
  V clamped = x < first ? first : x;
  clamped = clamped > last ? last : clamped;
  const V shifted = mul_add(clamped, zero + Plan::kLog2e, zero + Plan::kRound);
  const V n = shifted - Plan::kRound;
  const V high = mul_add(n, zero - Plan::kLn2High, clamped);
  const V r = mul_add(n, zero - Plan::kLn2Low, high);
  V poly = zero + Plan::kPoly[0];
  for (unsigned k = 1; k < sizeof(Plan::kPoly) / sizeof(T); ++k)
    poly = mul_add(poly, r, zero + Plan::kPoly[k]);
  const V e_r = mul_add(poly, r * r, r) + T(1);
  const V power = bits<V>((bits<U>(shifted) + Plan::kBias) << Plan::kMantissa);
  return x < first ? zero : e_r * power;
}

// e^x of a number or of a register of them.
template <class T, class V>
TC_HD V exponential(V x) {
  if constexpr (std::is_same_v<V, T>) {
    return exp_of<T, V, typename ExpPlan<T>::Bits>(x);
  } else {
    typedef typename ExpPlan<T>::Bits U __attribute__((vector_size(TC_VECTOR_BYTES)));
    return exp_of<T, V, U>(x);
  }
}

template <class T>
struct Exp {
  TC_HD T operator()(T x) const { return exponential<T>(x); }
  TC_HD Lanes<T> operator()(const Lanes<T>& x) const {
    Lanes<T> out;
    for (int k = 0; k < Lanes<T>::kParts; ++k) out.part[k] = exponential<T>(x.part[k]);
    return out;
  }
};

}  // namespace
}  // namespace tinyclip
