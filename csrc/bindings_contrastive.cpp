// Python's view of the contrastive engine on a CPU: one function a pass over a tile.
#include <pybind11/stl.h>

#include "bindings.h"
#include "contrastive/cpu.h"

namespace py = pybind11;
namespace con = tinyclip::contrastive;

namespace tinyclip {
namespace {

using Shape = std::tuple<Index, Index, Index>;             // M, N, offset of the positives
using Extent = std::tuple<Index, Index, Index, Index>;     // row, column, height, width
using TeacherLogits = std::tuple<Address, Index, double>;  // address, stride, scale
using Weight = std::tuple<Address, Index>;                 // address, stride 0 or 1
using Workspace = std::tuple<Address, Index>;              // address, bytes

constexpr std::size_t kWorkspaceAlignment = 64;

template <class T>
Index workspace_of(const Check& check, Index height, Index width) {
  check.at_least("height", height, 0);
  check.at_least("width", width, 0);
  // Far more than the workspace's own sum of products, which then cannot overflow either.
  const Index most = check.product("height", check.sum("height", height, 1), 1024);
  check.product("width", most, check.sum("width", width, 1));
  return static_cast<Index>(con::workspace_bytes<T>(height, width));
}

Index contrastive_workspace(const std::string& dtype, Index height, Index width) {
  const Check check("contrastive_workspace");
  return with_type(check, dtype,
                   [&](auto zero) { return workspace_of<decltype(zero)>(check, height, width); });
}

// What every call is told, checked: a problem, one of its tiles, and the machine.
template <class T>
struct Call {
  Check check;
  con::Problem<T> problem;
  con::Tile<T> tile;

  Call(const char* name, const Shape& shape, const Extent& extent, const Strided& logits,
       double scale, const std::optional<TeacherLogits>& teacher, bool in_place)
      : check(name) {
    std::tie(problem.rows.size, problem.columns.size, problem.offset) = shape;
    std::tie(tile.row, tile.column, tile.height, tile.width) = extent;
    problem.scale = static_cast<T>(scale);
    check.at_least("shape.M", problem.rows.size, 0);
    check.at_least("shape.N", problem.columns.size, 0);
    check.at_least("shape.offset", problem.offset, 0);
    check.product("shape.M", problem.rows.size, con::kStats * sizeof(T));
    check.product("shape.N", problem.columns.size, con::kStats * sizeof(T));
    check.require(
        check.sum("shape.offset", problem.offset, problem.rows.size) <= problem.columns.size,
        "shape.offset + shape.M must be at most shape.N");
    inside("tile.row", tile.row, "tile.height", tile.height, problem.rows.size);
    inside("tile.column", tile.column, "tile.width", tile.width, problem.columns.size);
    const auto [address, stride] = logits;
    check.matrix("logits", address, tile.height, tile.width, stride, sizeof(T), in_place);
    tile.logits = {reinterpret_cast<T*>(address), stride};
    if (!teacher) return;
    const auto [teacher_address, teacher_stride, teacher_scale] = *teacher;
    check.matrix("teacher", teacher_address, tile.height, tile.width, teacher_stride, sizeof(T),
                 false);
    check.require(teacher_address != 0, "teacher must not be null");
    tile.teacher = {reinterpret_cast<const T*>(teacher_address), teacher_stride};
    problem.teacher_scale = static_cast<T>(teacher_scale);
  }

  void inside(const std::string& begin_name, Index begin, const std::string& length_name,
              Index length, Index size) {
    check.at_least(begin_name, begin, 0);
    check.at_least(length_name, length, 0);
    check.require(check.sum(begin_name, begin, length) <= size,
                  begin_name + " + " + length_name + " must be at most " + std::to_string(size) +
                      ", got " + std::to_string(begin) + " + " + std::to_string(length));
  }

  void sides(Address rows, Address columns, bool written) {
    for (auto [name, side, address] : {std::tuple{"rows", &problem.rows, rows},
                                       std::tuple{"columns", &problem.columns, columns}}) {
      check.range(name, address, check.product(name, con::kStats, side->size), sizeof(T), written);
      side->stats = {reinterpret_cast<T*>(address), side->size};
    }
  }

  void weight(const char* name, con::Side<T>& side, const std::optional<Weight>& weight) {
    if (!weight) return;
    const auto [address, stride] = *weight;
    check.require(stride == 0 || stride == 1,
                  std::string(name) + ".stride must be 0 or 1, got " + std::to_string(stride));
    check.require(address != 0, std::string(name) + " must not be null");
    check.range(name, address, stride ? side.size : 1, sizeof(T), false);
    side.weight = reinterpret_cast<const T*>(address);
    side.weight_stride = stride;
  }

  void* workspace(const Workspace& workspace) {
    const auto [address, bytes] = workspace;
    const Index needed = workspace_of<T>(check, tile.height, tile.width);
    check.require(bytes >= needed, "workspace.bytes must be at least " + std::to_string(needed) +
                                       ", got " + std::to_string(bytes));
    check.range("workspace", address, bytes, 1, true, kWorkspaceAlignment);
    return reinterpret_cast<void*>(address);
  }

  void alpha(double value) {
    check.require(0 <= value && value <= 1,
                  "alpha must be in [0, 1], got " + std::to_string(value));
    check.require(value == 0 || tile.teacher.data,
                  "alpha above 0 needs a teacher, got " + std::to_string(value) + " and none");
    problem.alpha = static_cast<T>(value);
  }
};

void contrastive_stats(const std::string& dtype, const Shape& shape, const Extent& tile,
                       const Strided& logits, double scale,
                       const std::optional<TeacherLogits>& teacher, Address rows, Address columns,
                       Address positive, const Workspace& workspace, int threads,
                       const std::string& isa) {
  const char* name = "contrastive_stats";
  with_type(Check(name), dtype, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(name, shape, tile, logits, scale, teacher, false);
    call.sides(rows, columns, true);
    call.check.range("positive", positive, call.problem.rows.size, sizeof(T), true);
    call.problem.positive = reinterpret_cast<T*>(positive);
    void* scratch = call.workspace(workspace);
    check_threads(call.check, threads);
    const Isa which = isa_of(call.check, isa);
    py::gil_scoped_release release;
    con::stats(call.problem, call.tile, scratch, threads, which);
  });
}

void contrastive_grads(const std::string& dtype, const Shape& shape, const Extent& tile,
                       const Strided& logits, double scale,
                       const std::optional<TeacherLogits>& teacher, double alpha, Address rows,
                       Address columns, const std::optional<Weight>& row_weight,
                       const std::optional<Weight>& column_weight, Address dscale,
                       const Workspace& workspace, int threads, const std::string& isa) {
  const char* name = "contrastive_grads";
  with_type(Check(name), dtype, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(name, shape, tile, logits, scale, teacher, true);
    call.alpha(alpha);
    call.sides(rows, columns, false);
    call.weight("row_weight", call.problem.rows, row_weight);
    call.weight("column_weight", call.problem.columns, column_weight);
    call.check.require(row_weight || column_weight,
                       "row_weight and column_weight must not both be None");
    call.check.range("dscale", dscale, 1, sizeof(double), true);
    void* scratch = call.workspace(workspace);
    check_threads(call.check, threads);
    const Isa which = isa_of(call.check, isa);
    py::gil_scoped_release release;
    con::grads(call.problem, call.tile, reinterpret_cast<double*>(dscale), scratch, threads, which);
  });
}

void contrastive_whole(const std::string& dtype, const Extent& tile, const Strided& logits,
                       double scale, const std::optional<TeacherLogits>& teacher, double alpha,
                       Address loss, Address dscale, const Workspace& workspace, int threads,
                       const std::string& isa) {
  const char* name = "contrastive_whole";
  with_type(Check(name), dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto [row, column, height, width] = tile;
    Check(name).require(row == 0 && column == 0 && height == width && height > 0,
                        "tile must be (0, 0, M, M) with M of at least 1, got height " +
                            std::to_string(height) + ", width " + std::to_string(width));
    Call<T> call(name, {height, width, 0}, tile, logits, scale, teacher, true);
    call.alpha(alpha);
    call.check.range("loss", loss, 1, sizeof(T), true);
    call.check.range("dscale", dscale, 1, sizeof(T), true);
    void* scratch = call.workspace(workspace);
    check_threads(call.check, threads);
    const Isa which = isa_of(call.check, isa);
    py::gil_scoped_release release;
    con::whole(call.problem, call.tile, reinterpret_cast<T*>(loss), reinterpret_cast<T*>(dscale),
               scratch, threads, which);
  });
}

}  // namespace

void bind_contrastive(py::module_& m) {
  m.def("contrastive_workspace", &contrastive_workspace, arg("dtype"), arg("height"), arg("width"),
        "Bytes of workspace that a call on a tile of this extent needs.");
  m.def("contrastive_stats", &contrastive_stats, arg("dtype"), arg("shape"), arg("tile"),
        arg("logits"), arg("scale"), arg("teacher"), arg("rows"), arg("columns"), arg("positive"),
        arg("workspace"), arg("threads"), arg("isa") = "best",
        "Pass 1 of a tile of cosines: its share of the statistics of rows and columns.");
  m.def("contrastive_grads", &contrastive_grads, arg("dtype"), arg("shape"), arg("tile"),
        arg("logits"), arg("scale"), arg("teacher"), arg("alpha"), arg("rows"), arg("columns"),
        arg("row_weight"), arg("column_weight"), arg("dscale"), arg("workspace"), arg("threads"),
        arg("isa") = "best",
        "Pass 2 of a tile of cosines: dS in their place, and the sum of dS * cosine on dscale.");
  m.def("contrastive_whole", &contrastive_whole, arg("dtype"), arg("tile"), arg("logits"),
        arg("scale"), arg("teacher"), arg("alpha"), arg("loss"), arg("dscale"), arg("workspace"),
        arg("threads"), arg("isa") = "best",
        "Both passes of a problem that is one tile: the mean loss, and its dS and dscale.");
}

}  // namespace tinyclip
