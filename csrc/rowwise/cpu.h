// LayerNorm and the activation of an MLP on a CPU: everything about a row while it is in the cache.
//
// x has rows of `width` numbers; all else that has its shape is contiguous. Null pointers stand for
// what is absent. Sums over rows are taken in blocks that do not depend on the number of threads,
// so the result does not either.
#pragma once

#include "isa.h"
#include "target.h"

namespace tinyclip::rowwise {

// y = (s - mean) * rstd * weight + bias over the kept channels, s = x + residual.
template <class T>
struct LayerNorm {
  Index rows = 0, width = 0;
  Matrix<const T> x, residual;
  const T *weight = nullptr, *bias = nullptr;
  const bool* kept = nullptr;  // (width,)
  T eps = 0;
  T *y = nullptr, *total = nullptr;    // (rows, width); total is s, given where there is a residual
  T *mean = nullptr, *rstd = nullptr;  // (rows,)
};

// From dy, and dtotal on s itself, the gradients of s, weight and bias.
template <class T>
struct LayerNormGrad {
  Index rows = 0, width = 0;
  Matrix<const T> dy, dtotal, total;
  const T *weight = nullptr, *mean = nullptr, *rstd = nullptr;
  const bool* kept = nullptr;
  T *dx = nullptr, *dweight = nullptr, *dbias = nullptr;
};

enum class Activation { kGelu, kGeluTanh, kQuickGelu, kRelu };
constexpr int kActivations = 4;

// hidden = act(pre) * gate.
template <class T>
struct Activate {
  Index rows = 0, width = 0;
  const T *pre = nullptr, *gate = nullptr;  // (rows, width), (width,)
  T* hidden = nullptr;
};

// dpre in dhidden's place, hidden once more, and the gradients of fc1's bias and of the gate.
template <class T>
struct ActivateGrad {
  Index rows = 0, width = 0;
  const T *pre = nullptr, *gate = nullptr;
  T *dhidden = nullptr, *hidden = nullptr;
  T *dbias = nullptr, *dgate = nullptr;
};

template <class T>
void layer_norm(const LayerNorm<T>& problem, int threads, Isa isa);
template <class T>
void layer_norm_grad(const LayerNormGrad<T>& problem, int threads, Isa isa);
template <class T>
void activate(const Activate<T>& problem, Activation kind, int threads, Isa isa);
template <class T>
void activate_grad(const ActivateGrad<T>& problem, Activation kind, int threads, Isa isa);

}  // namespace tinyclip::rowwise
