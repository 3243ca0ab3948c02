// Python's view of the contrastive engine on a GPU: one function a pass over a panel.
#include "bindings.h"

#ifdef TINYCLIP_CUDA_ARCHS

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "check.h"
#include "contrastive/cuda.h"

namespace py = pybind11;
namespace con = tinyclip::contrastive;

namespace {

using tinyclip::Address;
using tinyclip::arg;
using tinyclip::Index;
using tinyclip::Strided;                             // of parts: address, length
using Shape = std::tuple<Index, Index, Index>;       // height, width, column of row 0's positive
using Features = std::tuple<Address, Index, Index>;  // address, stride, width
using Teacher = std::tuple<Features, Features, Address>;  // its a, its b, address of its scale
using Where = std::tuple<int, Address>;                   // device, stream

constexpr Index kMostTiles = 0x7fffffff;  // blocks of a launch
constexpr Index kFarthest = Index{1} << 40;

struct Kind {
  std::size_t bytes;
  con::CudaPasses passes;
};

Kind kind_of(const tinyclip::Check& check, const std::string& dtype) {
  if (dtype == "bfloat16") return {2, con::bf16_passes()};
  if (dtype == "float16") return {2, con::fp16_passes()};
  if (dtype == "float32") return {4, con::fp32_passes()};
  check.require(dtype == "tfloat32",
                "dtype must be bfloat16, float16, float32 or tfloat32, got '" + dtype + "'");
  return {4, con::tf32_passes()};
}

// What both passes are told, checked. Addresses are the device's: nothing here reads them.
struct Call {
  tinyclip::Check check;
  Kind kind;
  con::PanelArgs panel;
  bool teacher;
  con::Launch where;

  Call(const char* name, const std::string& dtype, const Shape& shape, const Features& a,
       const Features& b, Address scale, const std::optional<Teacher>& its, const Where& launch)
      : check(name), kind(kind_of(check, dtype)), teacher(its.has_value()) {
    std::tie(panel.height, panel.width, panel.diagonal) = shape;
    check.at_least("shape.height", panel.height, 1);
    check.at_least("shape.width", panel.width, 1);
    check.require(panel.height <= kFarthest && panel.width <= kFarthest,
                  "shape must be at most 2^40 rows and columns");
    check.require(-kFarthest <= panel.diagonal && panel.diagonal <= kFarthest,
                  "shape.diagonal must be within 2^40, got " + std::to_string(panel.diagonal));
    const Index down = con::ceil_div(panel.height, con::kTileRows);
    check.require(check.product("shape", down, panel.tiles_across(teacher)) <= kMostTiles,
                  "shape must be at most 2^31 - 1 tiles");
    panel.a = features("a", a, panel.height);
    panel.b = features("b", b, panel.width);
    check.require(panel.a.depth == panel.b.depth, "b.width must be a's");
    panel.scale = number("scale", scale);
    if (teacher) {
      const auto& [its_a, its_b, its_scale] = *its;
      panel.ta = features("teacher.a", its_a, panel.height);
      panel.tb = features("teacher.b", its_b, panel.width);
      check.require(panel.ta.depth == panel.tb.depth, "teacher.b.width must be its a's");
      panel.t_scale = number("teacher.scale", its_scale);
    }
    where.device = std::get<0>(launch);
    where.stream = std::get<1>(launch);
    check.at_least("launch.device", where.device, 0);
  }

  con::Features features(const std::string& name, const Features& from, Index rows) {
    const auto [address, stride, width] = from;
    const Index size = static_cast<Index>(kind.bytes);
    check.at_least(name + ".width", width, 0);
    check.at_least(name + ".stride", stride, 0);
    const con::Features found{reinterpret_cast<const char*>(address),
                              check.product(name + ".stride", stride, size),
                              check.product(name + ".width", width, size)};
    check.require(found.stride % 16 == 0 && found.depth % 16 == 0,
                  name + " must have a stride and a width of whole 16 bytes, got " +
                      std::to_string(found.stride) + " and " + std::to_string(found.depth));
    check.require(address % 16 == 0,
                  name + " must be aligned to 16 bytes, got address " + std::to_string(address));
    check.matrix(name, address, rows, width, stride, kind.bytes, false);
    return found;
  }

  float* vector(const char* name, Address address, Index count, bool written) {
    check.require(address != 0, std::string(name) + " must not be null");
    check.range(name, address, count, sizeof(float), written);
    return reinterpret_cast<float*>(address);
  }
  const float* number(const char* name, Address address) { return vector(name, address, 1, false); }

  // `count` arrays of `length` numbers, `stride` apart.
  float* arrays(const char* name, const Strided& from, Index count, Index length, bool written) {
    const auto [address, stride] = from;
    check.require(address != 0, std::string(name) + " must not be null");
    check.matrix(name, address, count, length, stride, sizeof(float), written);
    return reinterpret_cast<float*>(address);
  }

  Index across() const { return panel.tiles_across(teacher); }
  Index down() const { return con::ceil_div(panel.height, con::kTileRows); }
  Index numbers() const { return teacher ? con::kStats : 2; }

  void done(const std::string& error) const {
    if (!error.empty()) throw std::runtime_error(error);
  }
};

void stats(const std::string& dtype, const Shape& shape, const Features& a, const Features& b,
           Address scale, const std::optional<Teacher>& teacher, const Strided& row_parts,
           const Strided& column_parts, const Strided& rows, const Strided& columns,
           Address positive, const std::tuple<bool, bool>& first, const Where& launch) {
  Call call("contrastive_cuda_stats", dtype, shape, a, b, scale, teacher, launch);
  const con::PanelArgs& panel = call.panel;
  con::StatsArgs args{panel, {}, {}, nullptr};
  const auto parts = [&](const char* name, const Strided& from, Index count, Index length) {
    const Index arrays = call.check.product(name, count, call.numbers());
    return con::Parts{call.arrays(name, from, arrays, length, true), std::get<1>(from)};
  };
  args.rows = parts("row_parts", row_parts, call.across(), panel.height);
  args.columns = parts("column_parts", column_parts, call.down(), panel.width);
  args.positive = call.vector("positive", positive, panel.height, true);
  const auto merge = [&](const char* name, const Strided& into, const con::Parts& from, Index count,
                         Index size, bool is_first) {
    con::MergeArgs merge{from, count, {}, size, is_first};
    merge.into = {call.arrays(name, into, con::kStats, size, true), std::get<1>(into)};
    return merge;
  };
  const auto of_rows =
      merge("rows", rows, args.rows, call.across(), panel.height, std::get<0>(first));
  const auto of_columns =
      merge("columns", columns, args.columns, call.down(), panel.width, std::get<1>(first));
  std::string error;
  {
    py::gil_scoped_release release;
    error = call.kind.passes.stats(args, call.teacher, call.where);
    if (error.empty()) error = con::merge_on_gpu(of_rows, call.teacher, call.where);
    if (error.empty()) error = con::merge_on_gpu(of_columns, call.teacher, call.where);
  }
  call.done(error);
}

void grads(const std::string& dtype, const Shape& shape, const Features& a, const Features& b,
           Address scale, const std::optional<Teacher>& teacher, double alpha, const Strided& rows,
           const Strided& columns, Address row_weight, Address column_weight, const Strided& ds,
           Address dscale, const Where& launch) {
  Call call("contrastive_cuda_grads", dtype, shape, a, b, scale, teacher, launch);
  const con::PanelArgs& panel = call.panel;
  con::GradsArgs args;
  args.panel = panel;
  call.check.require(0 <= alpha && alpha <= 1,
                     "alpha must be in [0, 1], got " + std::to_string(alpha));
  args.alpha = static_cast<float>(alpha);
  args.rows = {call.arrays("rows", rows, con::kStats, panel.height, false), std::get<1>(rows)};
  args.columns = {call.arrays("columns", columns, con::kStats, panel.width, false),
                  std::get<1>(columns)};
  args.row_weight = call.vector("row_weight", row_weight, panel.height, false);
  args.column_weight = call.vector("column_weight", column_weight, panel.width, false);
  // Whole tiles are written.
  const auto [address, stride] = ds;
  const Index size = static_cast<Index>(call.kind.bytes);
  call.check.require(address != 0, "ds must not be null");
  call.check.require(address % 16 == 0 && stride % (16 / size) == 0,
                     "ds must be aligned to 16 bytes, and its stride to as many");
  call.check.matrix("ds", address, call.down() * con::kTileRows,
                    call.across() * con::tile_columns(call.teacher), stride, call.kind.bytes, true);
  args.ds = reinterpret_cast<char*>(address);
  args.ds_stride = stride * size;
  args.dscale = call.vector("dscale", dscale, panel.tiles(call.teacher), true);
  std::string error;
  {
    py::gil_scoped_release release;
    error = call.kind.passes.grads(args, call.teacher, call.where);
  }
  call.done(error);
}

}  // namespace

void tinyclip::bind_cuda(py::module_& m) {
  m.def(
      "contrastive_cuda_tile",
      [](bool teacher) { return std::tuple(con::kTileRows, con::tile_columns(teacher)); },
      arg("teacher"), "Rows and columns of a tile.");
  m.def(
      "contrastive_cuda_shared",
      [](bool teacher, int element) { return con::shared_bytes(teacher, element); }, arg("teacher"),
      arg("element"), "Bytes of shared memory that a tile's block takes; element: bytes of one.");
  m.def("contrastive_cuda_stats", &stats, arg("dtype"), arg("shape"), arg("a"), arg("b"),
        arg("scale"), arg("teacher"), arg("row_parts"), arg("column_parts"), arg("rows"),
        arg("columns"), arg("positive"), arg("first"), arg("launch"),
        "Pass 1 of a panel: its share of the statistics of rows and columns.");
  m.def("contrastive_cuda_grads", &grads, arg("dtype"), arg("shape"), arg("a"), arg("b"),
        arg("scale"), arg("teacher"), arg("alpha"), arg("rows"), arg("columns"), arg("row_weight"),
        arg("column_weight"), arg("ds"), arg("dscale"), arg("launch"),
        "Pass 2 of a panel: dS in whole tiles, and a tile's sum of dS * cosine each.");
}

#else

void tinyclip::bind_cuda(pybind11::module_&) {}

#endif
