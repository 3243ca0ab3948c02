// The CUDA kernels' own source, run on the host (simt.h), against fp64 and against the CPU engine.
//
//     cuda_tiles [quick]    every case, or a few; prints what differs
#include <sys/mman.h>

#include <cstring>
#include <string>

#include "contrastive/cpu.h"
#include "contrastive/cuda_merge.h"
#include "contrastive/cuda_products.h"
#include "contrastive/cuda_tile.h"
#include "simt.h"

namespace {

using namespace tinyclip;
using namespace tinyclip::contrastive;
using simt::Host;

int findings = 0;
#define EXPECT(holds, ...)                        \
  do {                                            \
    if (!(holds)) {                               \
      std::printf("%s:%d: ", __FILE__, __LINE__); \
      std::printf(__VA_ARGS__);                   \
      std::printf("\n");                          \
      if (++findings > 20) std::exit(1);          \
    }                                             \
  } while (0)

struct Shape {
  Index m, n, d, dt, offset;
  Index panel;  // the most rows and columns of one
  float scale = 20, alpha = 0.4f;
  bool negative = false;
};

constexpr float kCanary = 12345.0f;

template <class Element>
struct Rows {
  Index rows, depth, stride;  // stride in bytes
  std::vector<char> memory;
  std::vector<double> values;

  Rows(Index rows, Index depth, double sign, std::mt19937& random, float shift = 0.5f)
      : rows(rows), depth(depth) {
    stride = depth * Element::kBytes + 32;  // what lies between two rows is NaN
    memory.assign(rows * stride + 64, char(0xff));
    values.resize(rows * depth);
    std::normal_distribution<float> normal;
    for (Index r = 0; r < rows; ++r) {
      double norm = 0;
      std::vector<float> row(depth);
      for (float& x : row) {
        x = normal(random) + shift;
        norm += double(x) * x;
      }
      for (Index k = 0; k < depth; ++k) {
        const float x = float(sign * row[k] / std::sqrt(norm));
        char* at = data() + r * stride + k * Element::kBytes;
        if constexpr (Element::kBytes == 2) {
          const std::uint16_t bits = simt::encode(Element(), x);
          std::memcpy(at, &bits, 2);
        } else {
          std::memcpy(at, &x, 4);
        }
        values[r * depth + k] = simt::decode(Element(), at);
      }
    }
  }

  char* data() {
    return memory.data() + (16 - reinterpret_cast<std::uintptr_t>(memory.data()) % 16) % 16;
  }
  Features features(Index first) {
    return {data() + first * stride, stride, depth * Element::kBytes};
  }
};

template <class Element>
std::vector<double> cosines(const Rows<Element>& a, const Rows<Element>& b) {
  std::vector<double> result(a.rows * b.rows);
  for (Index i = 0; i < a.rows; ++i)
    for (Index j = 0; j < b.rows; ++j) {
      double sum = 0;
      for (Index k = 0; k < a.depth; ++k)
        sum += a.values[i * a.depth + k] * b.values[j * a.depth + k];
      result[i * b.rows + j] = sum;
    }
  return result;
}

// Of both passes, whoever computed them.
struct Results {
  std::vector<float> rows, columns, positive, ds;
  double dscale = 0;
};

// As _panels.py walks a problem: panels of whole tiles, rows outside, each kernel over each.
template <class Products, class Element, bool Teacher>
Results on_gpu(const Shape& shape, Rows<Element>& a, Rows<Element>& b, Rows<Element>& ta,
               Rows<Element>& tb, const std::vector<float>& row_weight,
               const std::vector<float>& column_weight, float t_scale, unsigned seed) {
  using Program = TileProgram<Host, Products, Teacher>;
  constexpr int kNumbers = Teacher ? kStats : 2, kColumns = tile_columns(Teacher);
  const Index m = shape.m, n = shape.n;
  const int shared = shared_bytes(Teacher, Element::kBytes);
  Results out{std::vector<float>(5 * m, kCanary), std::vector<float>(5 * n, kCanary),
              std::vector<float>(m + 1, kCanary), std::vector<float>(m * n), 0};
  const auto panels = [&](auto&& body) {
    for (Index top = 0; top < m; top += shape.panel)
      for (Index left = 0; left < n; left += shape.panel) {
        PanelArgs panel{a.features(top), b.features(left), {}, {}, &shape.scale, &t_scale};
        if (Teacher) panel.ta = ta.features(top), panel.tb = tb.features(left);
        panel.height = std::min(shape.panel, m - top);
        panel.width = std::min(shape.panel, n - left);
        panel.diagonal = shape.offset + top - left;
        body(panel, top, left);
      }
  };
  panels([&](const PanelArgs& panel, Index top, Index left) {
    const Index down = ceil_div(panel.height, kTileRows), across = panel.tiles_across(Teacher);
    std::vector<float> row_parts(across * kNumbers * panel.height + 1, kCanary);
    std::vector<float> column_parts(down * kNumbers * panel.width + 1, kCanary);
    StatsArgs args{panel,
                   {row_parts.data(), panel.height},
                   {column_parts.data(), panel.width},
                   out.positive.data() + top};
    simt::launch(panel.tiles(Teacher), kThreads, shared, seed,
                 [&](char* memory) { Program::stats(args, memory); });
    EXPECT(row_parts.back() == kCanary && column_parts.back() == kCanary, "parts overrun");
    const auto merge = [&](const MergeArgs& args) {
      simt::launch(ceil_div(args.size, kMergeThreads), kMergeThreads, 0, seed,
                   [&](char*) { merge_parts<Host, Teacher>(args); });
    };
    merge({args.rows, across, {out.rows.data() + top, m}, panel.height, left == 0});
    merge({args.columns, down, {out.columns.data() + left, n}, panel.width, top == 0});
  });
  EXPECT(out.positive.back() == kCanary, "positives overrun");
  panels([&](const PanelArgs& panel, Index top, Index left) {
    const Index down = ceil_div(panel.height, kTileRows), across = panel.tiles_across(Teacher);
    const Index stride = across * kColumns * Element::kBytes;
    std::vector<char> room(down * kTileRows * stride + 80, char(0x55));
    char* ds = room.data() + (16 - reinterpret_cast<std::uintptr_t>(room.data()) % 16) % 16;
    std::vector<float> sums(down * across + 1, kCanary);
    GradsArgs args{panel,
                   {out.rows.data() + top, m},
                   {out.columns.data() + left, n},
                   row_weight.data() + top,
                   column_weight.data() + left,
                   shape.alpha * Teacher,
                   ds,
                   stride,
                   sums.data()};
    simt::launch(panel.tiles(Teacher), kThreads, shared, seed + 99,
                 [&](char* memory) { Program::template grads<Element>(args, memory); });
    EXPECT(ds[down * kTileRows * stride] == 0x55, "dS overruns");
    EXPECT(sums.back() == kCanary, "sums overrun");
    for (Index t = 0; t < down * across; ++t) out.dscale += sums[t];
    for (Index i = 0; i < panel.height; ++i)
      for (Index j = 0; j < panel.width; ++j)
        out.ds[(top + i) * n + left + j] =
            simt::decode(Element(), ds + i * stride + j * Element::kBytes);
  });
  return out;
}

template <class T>
Results on_cpu(const Shape& shape, const std::vector<double>& cosine,
               const std::vector<double>& its, const std::vector<float>& row_weight,
               const std::vector<float>& column_weight, double t_scale) {
  const Index m = shape.m, n = shape.n;
  std::vector<T> s(cosine.begin(), cosine.end()), t(its.begin(), its.end());
  std::vector<T> rows(5 * m), columns(5 * n), positive(m);
  const std::vector<T> rw(row_weight.begin(), row_weight.end());
  const std::vector<T> cw(column_weight.begin(), column_weight.end());
  Problem<T> problem{{m, {rows.data(), m}, rw.data(), 1},
                     {n, {columns.data(), n}, cw.data(), 1},
                     shape.offset,
                     positive.data(),
                     T(shape.scale),
                     T(t_scale),
                     its.empty() ? T(0) : T(shape.alpha)};
  Tile<T> tile{0, 0, m, n, {s.data(), n}, {its.empty() ? nullptr : t.data(), n}};
  std::vector<char> room(workspace_bytes<T>(m, n) + 64);
  void* aligned = room.data() + (64 - reinterpret_cast<std::uintptr_t>(room.data()) % 64) % 64;
  Results out;
  stats(problem, tile, aligned, 1, Isa::kBaseline);
  grads(problem, tile, &out.dscale, aligned, 1, Isa::kBaseline);
  out.rows.assign(rows.begin(), rows.end());
  out.columns.assign(columns.begin(), columns.end());
  out.positive.assign(positive.begin(), positive.end());
  out.ds.assign(s.begin(), s.end());
  return out;
}

double norm(const std::vector<float>& x) {
  double sum = 0;
  for (float v : x) sum += double(v) * v;
  return std::sqrt(sum);
}

double distance(const std::vector<float>& x, const std::vector<float>& y, Index count) {
  double sum = 0;
  for (Index k = 0; k < count; ++k) sum += std::pow(double(x[k]) - y[k], 2);
  return std::sqrt(sum);
}

template <class Products, class Element, bool Teacher>
void check(const char* name, const Shape& shape, double product_eps, unsigned seed) {
  std::mt19937 random(seed);
  const double sign = shape.negative ? -1 : 1;
  const float shift = shape.negative ? 5 : 0.5f;  // all logits far below 0, and those of padding
  Rows<Element> a(shape.m, shape.d, 1, random, shift), b(shape.n, shape.d, sign, random, shift);
  Rows<Element> ta(Teacher ? shape.m : 0, shape.dt, 1, random);
  Rows<Element> tb(Teacher ? shape.n : 0, shape.dt, 1, random);
  std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
  std::vector<float> row_weight(shape.m), column_weight(shape.n);
  for (float& w : row_weight) w = uniform(random);
  for (float& w : column_weight) w = uniform(random);
  const float t_scale = 13;
  const Results ours = on_gpu<Products, Element, Teacher>(shape, a, b, ta, tb, row_weight,
                                                          column_weight, t_scale, seed);
  const auto s = cosines(a, b);
  const auto t = Teacher ? cosines(ta, tb) : std::vector<double>();
  const Results truth = on_cpu<double>(shape, s, t, row_weight, column_weight, t_scale);
  const Results engine = on_cpu<float>(shape, s, t, row_weight, column_weight, t_scale);
  const double logit_eps = 2e-6 + 40 * shape.scale * product_eps;
  const int numbers = Teacher ? 5 : 2;
  for (const Results* other : {&truth, &engine})
    for (const auto& [found, wanted, size] : {std::tuple{&ours.rows, &other->rows, shape.m},
                                              std::tuple{&ours.columns, &other->columns, shape.n}})
      for (int k = 0; k < numbers; ++k) {
        double worst = 0;
        for (Index i = 0; i < size; ++i) {
          const double x = (*found)[k * size + i], y = (*wanted)[k * size + i];
          worst = std::fmax(worst, std::fabs(x - y) / (std::fabs(y) + 1));
          if (std::isnan(x)) worst = 1e9;
        }
        EXPECT(worst < 10 * logit_eps, "%s: number %d of %lld off by %g", name, k, (long long)size,
               worst);
      }
  EXPECT(distance(ours.positive, truth.positive, shape.m) <= logit_eps * (norm(truth.positive) + 1),
         "%s: positives", name);
  for (Index i = numbers * shape.m; i < 5 * shape.m; ++i)
    EXPECT(ours.rows[i] == kCanary, "%s: wrote a number that is not there", name);
  const double ds_eps = Element::kBytes == 4 ? 1e-6 : std::is_same_v<Element, Bf16> ? 4e-3 : 5e-4;
  const double error = distance(ours.ds, truth.ds, shape.m * shape.n) / (norm(truth.ds) + 1e-9);
  EXPECT(error < ds_eps + 20 * logit_eps, "%s: dS off by %g", name, error);
  // The CPU engine's sum has terms as large as ours; dS itself is rounded after it is summed.
  double terms = 0;
  for (Index k = 0; k < shape.m * shape.n; ++k) terms += std::fabs(truth.ds[k] * s[k]);
  EXPECT(std::fabs(ours.dscale - truth.dscale) < 10 * logit_eps * terms + 1e-6,
         "%s: dscale %g, not %g", name, ours.dscale, truth.dscale);
}

// dS of a panel whose only logit is sure: what is left of P - 1, and the same bits of S.
template <class Products, class Element>
void sure() {
  std::mt19937 random(5);
  Shape shape{1, 1, 64, 0, 0, 128};
  shape.scale = 100;
  Rows<Element> a(1, 64, 1, random), b = a, none(0, 0, 1, random);
  const Results found = on_gpu<Products, Element, false>(shape, a, b, none, none, {1}, {2}, 1, 3);
  EXPECT(found.ds[0] == 0 && found.dscale == 0, "one pair alone pulls %g", found.ds[0]);
}

// Rows 64 MiB apart: the last begins past 2^32 bytes. A few pages of it are memory.
void far_rows() {
  const Index stride = Index{1} << 26, rows = 130;
  const std::size_t bytes = rows * stride;
  void* room = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) {
    std::printf("far rows: no address space to reserve, skipped\n");
    return;
  }
  using Products = MmaProducts<Host, Fp32<true>, false>;
  char* far = static_cast<char*>(room);
  std::vector<float> near(rows * 4), ones{1, 0, 0, 0}, parts(2 * 2 * rows), more(2 * 2 * 4);
  for (Index r = 0; r < rows; ++r) {
    const float row[4] = {float(r + 1), 0, 0, 0};
    std::memcpy(far + r * stride, row, 16);
  }
  const float scale = 1;
  std::vector<float> positive(rows, kCanary);
  char* one = reinterpret_cast<char*>(ones.data());
  PanelArgs panel{{far, stride, 16}, {one, 16, 16}, {}, {}, &scale, nullptr, rows, 1, -129};
  StatsArgs args{panel, {parts.data(), rows}, {more.data(), 1}, positive.data()};
  simt::launch(panel.tiles(false), kThreads, shared_bytes(false, 4), 1,
               [&](char* memory) { TileProgram<Host, Products, false>::stats(args, memory); });
  for (Index r = 0; r < rows; ++r)
    EXPECT(parts[r] == float(r + 1), "row %lld has maximum %g", (long long)r, parts[r]);
  EXPECT(positive[129] == 130 && positive[128] == kCanary, "positive %g", positive[129]);
  munmap(room, bytes);
}

// Fragments cover a tile once, chunks a stage, and eight rows of a chunk every bank.
template <class At>
void maps() {
  std::vector<int> seen(At::kRows * At::kColumns);
  for (int thread = 0; thread < kThreads; ++thread)
    for (int i = 0; i < At::kM; ++i)
      for (int j = 0; j < At::kN; ++j)
        for (int e = 0; e < 4; ++e)
          ++seen[At::row(thread, i, e / 2) * At::kColumns + At::column(thread, j, e % 2)];
  for (int count : seen) EXPECT(count == 1, "an element is held %d times", count);
  std::vector<int> bytes(kTileRows * kStepBytes / 16);
  for (int row = 0; row < kTileRows; ++row)
    for (int chunk = 0; chunk < 8; ++chunk) ++bytes[swizzled(row, chunk) / 16];
  for (int count : bytes) EXPECT(count == 1, "16 bytes are used %d times", count);
  for (int chunk = 0; chunk < 8; ++chunk)
    for (int first = 0; first < kTileRows; first += 8) {
      int banks = 0;
      for (int row = first; row < first + 8; ++row) banks |= 1 << swizzled(row, chunk) / 16 % 8;
      EXPECT(banks == 255, "chunk %d of rows %d meets a bank twice", chunk, first);
    }
}

template <class Element, bool Teacher>
void family(const char* name, const std::vector<Shape>& shapes, double eps, bool wgmma) {
  unsigned seed = 1;
  for (const Shape& shape : shapes) {
    check<MmaProducts<Host, Element, Teacher>, Element, Teacher>(name, shape, eps, ++seed);
    if constexpr (Element::kBytes == 2)
      if (wgmma)
        check<WgmmaProducts<Host, Element, Teacher>, Element, Teacher>(name, shape, eps, ++seed);
  }
}

}  // namespace

int main(int count, char** words) {
  const bool quick = count > 1 && std::string(words[1]) == "quick";
  maps<MmaLayout<false>>();
  maps<MmaLayout<true>>();
  maps<WgmmaLayout<false>>();
  maps<WgmmaLayout<true>>();
  EXPECT(shared_bytes(false, 2) <= 99 * 1024 && shared_bytes(true, 4) <= 99 * 1024,
         "more shared memory than a consumer chip has");
  Shape negative{33, 50, 24, 16, 3, 128};
  negative.negative = true;
  negative.scale = 900;
  std::vector<Shape> shapes{{1, 1, 8, 8, 0, 128}, {130, 150, 200, 72, 20, 128}, negative};
  if (!quick) {
    shapes.push_back({128, 128, 64, 64, 0, 128});
    shapes.push_back({129, 257, 512, 136, 100, 256});
    shapes.push_back({200, 200, 328, 400, 0, 8192});
    shapes.push_back({3, 300, 16, 8, 290, 128});
  }
  family<Bf16, false>("bf16", shapes, 1e-7, true);
  family<Bf16, true>("bf16 with a teacher", shapes, 1e-7, true);
  family<Fp16, true>("fp16 with a teacher", {shapes[1]}, 1e-7, true);
  family<Fp32<true>, false>("fp32", shapes, 2e-7, false);
  family<Fp32<true>, true>("fp32 with a teacher", {shapes[1]}, 2e-7, false);
  family<Fp32<false>, false>("tf32", {shapes[1]}, 1e-4, false);
  sure<MmaProducts<Host, Bf16, false>, Bf16>();
  sure<WgmmaProducts<Host, Bf16, false>, Bf16>();
  sure<MmaProducts<Host, Fp32<true>, false>, Fp32<true>>();
  far_rows();
  std::printf("%d findings\n", findings);
  return findings != 0;
}
