// The parts of csrc/contrastive that need no Python, on their own: test_engine.py compiles and runs
// this. Prints a line for each finding and returns how many there were.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#ifndef TC_VECTOR_BYTES
#define TC_VECTOR_BYTES 16
#endif
#include "check.h"
#include "contrastive/cpu_rows.h"

using namespace tinyclip;
using namespace tinyclip::contrastive;

static int findings = 0;

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    if (!(condition)) {                                           \
      ++findings;                                                 \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

// The exponential: units in the last place against long double, lanes against scalars.
template <class T>
void exponential(T lowest, double most_ulps) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> uniform(lowest, 0.0);
  const Exp<T> exp;
  double worst = 0;
  for (int k = 0; k < 2000000; ++k) {
    const T x = static_cast<T>(k % 2 ? uniform(random) : uniform(random) * 0.01);
    const T ours = exp(x);
    const long double truth = std::exp(static_cast<long double>(x));
    const T rounded = static_cast<T>(truth);
    const T ulp = std::nextafter(rounded, std::numeric_limits<T>::infinity()) - rounded;
    worst = std::fmax(worst, std::fabs(static_cast<double>((ours - truth) / ulp)));
  }
  std::printf("exp: %.3f ulp in %zu bytes\n", worst, sizeof(T));
  EXPECT(worst <= most_ulps, "%.3f ulp", worst);
  EXPECT(exp(T(0)) == 1, "%g", double(exp(T(0))));
  const T infinity = std::numeric_limits<T>::infinity();
  EXPECT(exp(-infinity) == 0, "%g", double(exp(-infinity)));
  EXPECT(exp(lowest - 2) == 0, "%g", double(exp(lowest - 2)));
  EXPECT(std::isnan(exp(std::numeric_limits<T>::quiet_NaN())), "NaN is lost");
  T lane[Lanes<T>::kWidth];
  for (int k = 0; k < Lanes<T>::kWidth; ++k) lane[k] = static_cast<T>(-k * 1.7);
  lane[1] = std::numeric_limits<T>::quiet_NaN();
  T out[Lanes<T>::kWidth];
  store(out, exp(load<Lanes<T>>(lane)));
  for (int k = 0; k < Lanes<T>::kWidth; ++k)
    EXPECT(k == 1 ? std::isnan(out[k]) : out[k] == exp(lane[k]), "lane %d", k);
}

template <class T>
Stat<T> of(const std::vector<T>& s, const std::vector<T>& t, std::size_t begin, std::size_t end) {
  Stat<T> stat{Lowest<T>::value, 0, Lowest<T>::value, 0, 0};
  for (std::size_t k = begin; k < end; ++k) {
    stat.m = larger(s[k], stat.m);
    stat.m_t = larger(t[k], stat.m_t);
  }
  for (std::size_t k = begin; k < end; ++k) add<true>(stat, s[k], t[k], Exp<T>());
  return stat;
}

// However a set of logits is cut, parts merge to the statistics of the whole.
template <class T>
void merging(double tolerance) {
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  for (double level : {-1000.0, 0.0, 1000.0}) {
    std::vector<T> s(301), t(301);
    for (auto& x : s) x = static_cast<T>(level + 20 * normal(random));
    for (auto& x : t) x = static_cast<T>(-level + 20 * normal(random));
    const Stat<T> whole = of(s, t, 0, s.size());
    for (std::size_t cut : {0, 1, 150, 300, 301}) {
      Stat<T> merged = of(s, t, 0, cut);
      merge<true>(merged, of(s, t, cut, s.size()), Exp<T>());
      const T scale = std::fabs(whole.u) + whole.l_t;
      EXPECT(merged.m == whole.m && merged.m_t == whole.m_t, "maxima, cut at %zu", cut);
      EXPECT(std::fabs(merged.l / whole.l - 1) < tolerance, "l, cut at %zu", cut);
      EXPECT(std::fabs(merged.l_t / whole.l_t - 1) < tolerance, "l_t, cut at %zu", cut);
      EXPECT(std::fabs(merged.u - whole.u) < tolerance * 50 * scale, "u, cut at %zu", cut);
    }
  }
}

// Offsets in 64 bits: addresses only, nothing is read.
void offsets() {
  for (Index at : {Index{1} << 31, Index{1} << 32, (Index{1} << 31) - 1, Index{1} << 40}) {
    const Matrix<float> matrix{nullptr, at};
    const auto bytes = [](const float* p) { return reinterpret_cast<std::uintptr_t>(p); };
    EXPECT(bytes(matrix.at(3, 5)) == std::uintptr_t(3 * at + 5) * 4, "matrix at %lld",
           (long long)at);
    const Table<float> table{nullptr, at};
    EXPECT(bytes(table.at(kCross, at - 1)) == std::uintptr_t(5 * at - 1) * 4, "table");
    Tile<float> tile;
    tile.row = 7;
    tile.column = at;
    EXPECT(tile.positive(at + 2, 3) == 12, "%lld", (long long)tile.positive(at + 2, 3));
    EXPECT(tile.positive(0, 0) == 7 - at, "%lld", (long long)tile.positive(0, 0));
    // What 32 bits would have made of it.
    EXPECT(static_cast<int>(3 * at + 5) != 3 * at + 5, "the probe proves nothing");
  }
}

// Sizes that overflow are refused, not wrapped.
template <class F>
bool refuses(F call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void checks() {
  const Index huge = Index{1} << 62;
  EXPECT(refuses([&] { Check("c").product("x", huge, 4); }), "product");
  EXPECT(refuses([&] { Check("c").sum("x", huge, huge); }), "sum");
  EXPECT(refuses([&] { Check("c").range("x", 64, huge, 8, false); }), "bytes");
  EXPECT(refuses([&] { Check("c").range("x", ~std::uintptr_t{63}, 64, 4, false); }), "end");
  EXPECT(refuses([&] { Check("c").matrix("x", 64, 3, 4, 3, 4, false); }), "stride");
  EXPECT(refuses([&] { Check("c").range("x", 66, 1, 4, false); }), "alignment");
  EXPECT(refuses([&] {
           Check check("c");
           check.range("x", 64, 4, 4, true);
           check.range("y", 76, 4, 4, false);
         }),
         "overlap");
  EXPECT(!refuses([&] {
    Check check("c");
    check.range("x", 64, 4, 4, true);
    check.range("y", 80, 4, 4, true);
    check.range("z", 96, 4, 4, false);
    check.range("w", 100, 4, 4, false);
  }),
         "neighbours, and two that are only read");
}

int main() {
  exponential<float>(-87.3f, 1.0);
  exponential<double>(-708.0, 1.0);
  merging<float>(2e-6);
  merging<double>(2e-15);
  offsets();
  checks();
  return findings;
}
