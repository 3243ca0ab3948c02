// Python's view of LayerNorm and of activations on a CPU. x and what else may be a view comes with
// its stride; everything else is contiguous. None stands for what is absent.
#include <pybind11/stl.h>

#include "bindings.h"
#include "rowwise/cpu.h"

namespace py = pybind11;

namespace tinyclip {
namespace {

using rowwise::Activation;
using Shape = std::tuple<Index, Index>;  // rows, width
using Vector = std::optional<Address>;

// What every call is told, checked.
template <class T>
struct Call {
  Check check;
  Index rows, width;
  int threads;
  Isa isa;

  Call(const char* name, const Shape& shape, int threads, const std::string& isa)
      : check(name), threads(threads), isa(isa_of(check, isa)) {
    std::tie(rows, width) = shape;
    check.at_least("shape.rows", rows, 1);
    check.at_least("shape.width", width, 1);
    check.product("shape", check.product("shape", rows, width), sizeof(T));
    check_threads(check, threads);
  }

  template <class Problem>
  Problem problem() const {
    Problem problem;
    problem.rows = rows;
    problem.width = width;
    return problem;
  }

  Matrix<const T> matrix(const char* name, const std::optional<Strided>& given) {
    if (!given) return {};
    const auto [address, stride] = *given;
    check.matrix(name, address, rows, width, stride, sizeof(T), false);
    return {reinterpret_cast<const T*>(address), stride};
  }

  // `count` numbers, or null; E is const where they are only read.
  template <class E>
  E* array(const char* name, const Vector& given, Index count) {
    if (!given) return nullptr;
    check.range(name, *given, count, sizeof(E), !std::is_const_v<E>);
    return reinterpret_cast<E*>(*given);
  }
  template <class E>
  E* full(const char* name, const Vector& given) {
    return array<E>(name, given, rows * width);
  }
};

void layer_norm_forward(const std::string& dtype, const Shape& shape, const Strided& x,
                        const std::optional<Strided>& residual, const Vector& weight,
                        const Vector& bias, const Vector& kept, double eps, Address y,
                        const Vector& total, Address mean, Address rstd, int threads,
                        const std::string& isa) {
  const char* name = "layer_norm_forward";
  with_type(Check(name), dtype, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(name, shape, threads, isa);
    auto problem = call.template problem<rowwise::LayerNorm<T>>();
    problem.x = call.matrix("x", x);
    problem.residual = call.matrix("residual", residual);
    problem.weight = call.template array<const T>("weight", weight, call.width);
    problem.bias = call.template array<const T>("bias", bias, call.width);
    problem.kept = call.template array<const bool>("kept", kept, call.width);
    call.check.require(eps >= 0, "eps must not be negative, got " + std::to_string(eps));
    problem.eps = static_cast<T>(eps);
    problem.y = call.template full<T>("y", y);
    call.check.require(residual.has_value() == total.has_value(),
                       "total must be given with a residual, and only then");
    problem.total = call.template full<T>("total", total);
    problem.mean = call.template array<T>("mean", mean, call.rows);
    problem.rstd = call.template array<T>("rstd", rstd, call.rows);
    py::gil_scoped_release release;
    rowwise::layer_norm(problem, threads, call.isa);
  });
}

void layer_norm_backward(const std::string& dtype, const Shape& shape, const Strided& dy,
                         const std::optional<Strided>& dtotal, const Strided& total,
                         const Vector& weight, const Vector& kept, Address mean, Address rstd,
                         const Vector& dx, const Vector& dweight, const Vector& dbias, int threads,
                         const std::string& isa) {
  const char* name = "layer_norm_backward";
  with_type(Check(name), dtype, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(name, shape, threads, isa);
    auto problem = call.template problem<rowwise::LayerNormGrad<T>>();
    problem.dy = call.matrix("dy", dy);
    problem.dtotal = call.matrix("dtotal", dtotal);
    problem.total = call.matrix("total", total);
    problem.weight = call.template array<const T>("weight", weight, call.width);
    problem.kept = call.template array<const bool>("kept", kept, call.width);
    problem.mean = call.template array<const T>("mean", mean, call.rows);
    problem.rstd = call.template array<const T>("rstd", rstd, call.rows);
    problem.dx = call.template full<T>("dx", dx);
    problem.dweight = call.template array<T>("dweight", dweight, call.width);
    problem.dbias = call.template array<T>("dbias", dbias, call.width);
    py::gil_scoped_release release;
    rowwise::layer_norm_grad(problem, threads, call.isa);
  });
}

Activation activation_of(const Check& check, const std::string& name) {
  static const std::tuple<const char*, Activation> known[] = {
      {"gelu", Activation::kGelu},
      {"gelu_tanh", Activation::kGeluTanh},
      {"quick_gelu", Activation::kQuickGelu},
      {"relu", Activation::kRelu}};
  for (const auto& [known_name, kind] : known)
    if (name == known_name) return kind;
  check.require(false, "kind must be gelu, gelu_tanh, quick_gelu or relu, got '" + name + "'");
  return Activation::kGelu;
}

void activation_forward(const std::string& dtype, const std::string& kind, const Shape& shape,
                        Address pre, const Vector& gate, Address hidden, int threads,
                        const std::string& isa) {
  const char* name = "activation_forward";
  with_type(Check(name), dtype, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(name, shape, threads, isa);
    const Activation which = activation_of(call.check, kind);
    auto problem = call.template problem<rowwise::Activate<T>>();
    problem.pre = call.template full<const T>("pre", pre);
    problem.gate = call.template array<const T>("gate", gate, call.width);
    problem.hidden = call.template full<T>("hidden", hidden);
    py::gil_scoped_release release;
    rowwise::activate(problem, which, threads, call.isa);
  });
}

void activation_backward(const std::string& dtype, const std::string& kind, const Shape& shape,
                         Address pre, const Vector& gate, Address dhidden, const Vector& hidden,
                         const Vector& dbias, const Vector& dgate, int threads,
                         const std::string& isa) {
  const char* name = "activation_backward";
  with_type(Check(name), dtype, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(name, shape, threads, isa);
    const Activation which = activation_of(call.check, kind);
    auto problem = call.template problem<rowwise::ActivateGrad<T>>();
    problem.pre = call.template full<const T>("pre", pre);
    problem.gate = call.template array<const T>("gate", gate, call.width);
    problem.dhidden = call.template full<T>("dhidden", dhidden);
    problem.hidden = call.template full<T>("hidden", hidden);
    problem.dbias = call.template array<T>("dbias", dbias, call.width);
    problem.dgate = call.template array<T>("dgate", dgate, call.width);
    call.check.require(gate || !dgate, "dgate must be None where there is no gate");
    py::gil_scoped_release release;
    rowwise::activate_grad(problem, which, threads, call.isa);
  });
}

}  // namespace

void bind_rowwise(py::module_& m) {
  m.def("layer_norm_forward", &layer_norm_forward, arg("dtype"), arg("shape"), arg("x"),
        arg("residual"), arg("weight"), arg("bias"), arg("kept"), arg("eps"), arg("y"),
        arg("total"), arg("mean"), arg("rstd"), arg("threads"), arg("isa") = "best",
        "y, x + residual, mean and rstd of rows, over the kept channels.");
  m.def("layer_norm_backward", &layer_norm_backward, arg("dtype"), arg("shape"), arg("dy"),
        arg("dtotal"), arg("total"), arg("weight"), arg("kept"), arg("mean"), arg("rstd"),
        arg("dx"), arg("dweight"), arg("dbias"), arg("threads"), arg("isa") = "best",
        "The gradients of what was normalised, of weight and of bias.");
  m.def("activation_forward", &activation_forward, arg("dtype"), arg("kind"), arg("shape"),
        arg("pre"), arg("gate"), arg("hidden"), arg("threads"), arg("isa") = "best",
        "The activation, times the gate.");
  m.def("activation_backward", &activation_backward, arg("dtype"), arg("kind"), arg("shape"),
        arg("pre"), arg("gate"), arg("dhidden"), arg("hidden"), arg("dbias"), arg("dgate"),
        arg("threads"), arg("isa") = "best",
        "dpre in dhidden's place, the activation again, and the column sums.");
}

}  // namespace tinyclip
