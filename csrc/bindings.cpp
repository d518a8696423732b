// The pybind11 module essa_kernels._C: raw pointers in, kernels out. Tensors are checked in Python, before any call; a
// `_direct` call takes the tensors themselves and checks them here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/features.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "tensors.h"
#ifdef ESSA_WITH_CUDA
#include "cuda/essa_cuda.h"
#endif

namespace py = pybind11;

namespace essa {
namespace {

const cpu::Kernels* kernels = nullptr;

noise::Key make_key(uint64_t seed, uint32_t generation, uint32_t site, uint64_t member) {
  return noise::Key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), site,
                    static_cast<uint32_t>(member >> 1), generation};
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void fill(uintptr_t out, int64_t rows, int64_t cols, uint64_t seed, uint32_t generation, uint32_t site,
          uint64_t member, int threads, int tile, int64_t grain,
          void (*kernel)(const cpu::NoiseArgs&, int64_t, int64_t)) {
  const cpu::NoiseArgs args{pointer<float>(out), rows, cols, make_key(seed, generation, site, member),
                            (member & 1) != 0};
  const int64_t tiles = rows * noise::tiles_per_row(cols, tile);
  py::gil_scoped_release release;
  cpu::parallel_for(threads, tiles, grain, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

// A range below these sizes costs more to hand over than to compute.
constexpr int64_t kGaussianGrain = 256, kRademacherGrain = 32, kRowGrain = 12;
// Whole panels and whole blocks of every instruction set.
constexpr int64_t kPanelGrain = 32, kVocabGrain = 48;

void gaussian_cpu(uintptr_t out, int64_t rows, int64_t cols, uint64_t seed, uint32_t generation, uint32_t site,
                  uint64_t member, int threads) {
  fill(out, rows, cols, seed, generation, site, member, threads, noise::kGaussianTile, kGaussianGrain,
       kernels->gaussian);
}

void rademacher_cpu(uintptr_t out, int64_t rows, int64_t cols, uint64_t seed, uint32_t generation, uint32_t site,
                    uint64_t member, int threads) {
  fill(out, rows, cols, seed, generation, site, member, threads, noise::kRademacherTile, kRademacherGrain,
       kernels->rademacher);
}

void run_rows(const cpu::SvdLoraArgs& args, int threads) {
  py::gil_scoped_release release;
  cpu::parallel_for(threads, args.rows, kRowGrain,
                    [&](int64_t first, int64_t last) { kernels->svd_lora(args, first, last); });
}

void svd_lora_cpu(uintptr_t y, int64_t y_stride, uintptr_t x, int64_t x_stride, uintptr_t v_a, uintptr_t core,
                  uintptr_t u_b, int64_t u_b_row_stride, int64_t u_b_col_stride, uintptr_t s_a, uintptr_t s_b,
                  uintptr_t offsets, int64_t rows, int64_t members, int64_t d_in, int64_t d_out, int64_t r_a,
                  int64_t r_b, int dtype, int threads) {
  cpu::SvdLoraArgs args{};
  args.dtype = dtype;
  args.rows = rows, args.members = members;
  args.d_in = d_in, args.d_out = d_out, args.r_a = r_a, args.r_b = r_b;
  args.x = pointer<void>(x), args.x_stride = x_stride;
  args.v_a = pointer<void>(v_a), args.core = pointer<float>(core);
  args.s_a = pointer<float>(s_a), args.s_b = pointer<float>(s_b), args.offsets = pointer<int64_t>(offsets);
  args.u_b = pointer<void>(u_b), args.u_b_row_stride = u_b_row_stride, args.u_b_col_stride = u_b_col_stride;
  args.y = pointer<void>(y), args.y_stride = y_stride;
  run_rows(args, threads);
}

void svd_lora_shrink_cpu(uintptr_t h, int64_t h_stride, uintptr_t x, int64_t x_stride, uintptr_t v_a, uintptr_t core,
                         uintptr_t s_a, uintptr_t s_b, uintptr_t offsets, int64_t rows, int64_t members, int64_t d_in,
                         int64_t r_a, int64_t r_b, int dtype, int threads) {
  cpu::SvdLoraArgs args{};
  args.dtype = dtype;
  args.rows = rows, args.members = members;
  args.d_in = d_in, args.r_a = r_a, args.r_b = r_b;
  args.x = pointer<void>(x), args.x_stride = x_stride;
  args.v_a = pointer<void>(v_a), args.core = pointer<float>(core);
  args.s_a = pointer<float>(s_a), args.s_b = pointer<float>(s_b), args.offsets = pointer<int64_t>(offsets);
  args.h = pointer<float>(h), args.h_stride = h_stride;
  run_rows(args, threads);
}

void svd_lora_expand_cpu(uintptr_t y, int64_t y_stride, uintptr_t h, int64_t h_stride, uintptr_t u_b,
                         int64_t u_b_row_stride, int64_t u_b_col_stride, int64_t rows, int64_t d_out, int64_t r_b,
                         int dtype, int threads) {
  cpu::SvdLoraArgs args{};
  args.dtype = dtype;
  args.rows = rows, args.d_out = d_out, args.r_b = r_b;
  args.h = pointer<float>(h), args.h_stride = h_stride;
  args.u_b = pointer<void>(u_b), args.u_b_row_stride = u_b_row_stride, args.u_b_col_stride = u_b_col_stride;
  args.y = pointer<void>(y), args.y_stride = y_stride;
  run_rows(args, threads);
}

// --- Calls that take tensors. Each knows the plain case of its op's contract: it returns nothing unless all is so, for
// Python's checks to name what is wrong or bring it into that form. It returns true when it has computed the op, and false
// when the tensors are not on the CPU or `threads` is 0, which asks for the check alone.

const DLPackExchangeAPI* exchange = nullptr;

// Where the framework's tensors are read from, by the capsule that their type carries. False if it is not of use.
bool use_exchange(py::object capsule) {
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
  const auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api->major != 1 || api->view_object == nullptr) return false;
  exchange = api;
  return true;
}

struct Argument {
  Tensor& tensor;
  py::handle object;
};

bool read(std::initializer_list<Argument> arguments) {
  for (const Argument& argument : arguments) {
    if (exchange->view_object(argument.object.ptr(), &argument.tensor) == 0) continue;
    PyErr_Clear();
    return false;
  }
  return true;
}

bool cover(const Tensor& offsets, int64_t rows) {
  const int64_t* values = pointer<int64_t>(offsets.address());
  const int64_t members = offsets.shape[0] - 1;
  bool ascend = values[0] == 0 && values[members] == rows;
  for (int64_t m = 0; m < members; ++m) ascend = ascend && values[m] <= values[m + 1];
  return ascend;
}

// Whether y can be the result for x: its dtype, its device, its leading dimensions.
bool matches(const Tensor& y, const Tensor& x) {
  return y.dtype() == x.dtype() && y.is_beside(x) && y.ndim == x.ndim &&
         std::equal(x.shape, x.shape + x.ndim - 1, y.shape);
}

bool runs_here(const Tensor& tensor, int threads) { return tensor.device_type == kCpuDevice && threads > 0; }

bool shrink_fits(const Tensor& x, const Tensor& v_a, const Tensor& core, const Tensor& s_a, const Tensor& s_b,
                 const Tensor& offsets, Rows& x_rows) {
  if (v_a.ndim != 2 || s_b.ndim != 2 || x.dtype() < 0 || !x_rows.take(x)) return false;
  const int64_t r_a = v_a.shape[0], d_in = v_a.shape[1], members = s_b.shape[0], r_b = s_b.shape[1];
  return r_a * d_in * r_b > 0 && x.shape[x.ndim - 1] == d_in && v_a.is(x.dtype(), {r_a, d_in}) &&
         core.is(cpu::kFloat32, {r_b, r_a}) && s_a.is(cpu::kFloat32, {members, r_a}) &&
         s_b.is(cpu::kFloat32, {members, r_b}) && offsets.is(kInt64, {members + 1}) && v_a.is_beside(x) &&
         core.is_beside(x) && s_a.is_beside(x) && s_b.is_beside(x) && offsets.is_beside(x) &&
         (x.device_type != kCpuDevice || cover(offsets, x_rows.count));
}

bool expand_fits(const Tensor& y, const Tensor& u_b, int64_t r_b, int64_t rows, Rows& y_rows) {
  if (y.dtype() < 0 || !y_rows.take(y) || u_b.ndim != 2) return false;
  const int64_t d_out = y.shape[y.ndim - 1];
  const bool transposed = (u_b.strides[0] == 1 || d_out == 1) && (u_b.strides[1] == d_out || r_b == 1);
  return d_out * r_b > 0 && y_rows.count == rows && (rows < 2 || y_rows.stride >= d_out) &&
         u_b.has_shape({d_out, r_b}) && u_b.dtype() == y.dtype() && u_b.is_beside(y) &&
         (transposed || u_b.is_contiguous());
}

std::optional<bool> svd_lora_direct(py::handle y_, py::handle x_, py::handle v_a_, py::handle core_, py::handle u_b_,
                                    py::handle s_a_, py::handle s_b_, py::handle offsets_, int threads) {
  Tensor y, x, v_a, core, u_b, s_a, s_b, offsets;
  Rows x_rows, y_rows;
  if (!read({{y, y_}, {x, x_}, {v_a, v_a_}, {core, core_}, {u_b, u_b_}, {s_a, s_a_}, {s_b, s_b_}, {offsets, offsets_}}) ||
      !shrink_fits(x, v_a, core, s_a, s_b, offsets, x_rows) ||
      !expand_fits(y, u_b, core.shape[0], x_rows.count, y_rows) || !matches(y, x))
    return std::nullopt;
  if (!runs_here(y, threads)) return false;
  svd_lora_cpu(y.address(), y_rows.stride, x.address(), x_rows.stride, v_a.address(), core.address(), u_b.address(),
               u_b.strides[0], u_b.strides[1], s_a.address(), s_b.address(), offsets.address(), x_rows.count,
               s_b.shape[0], v_a.shape[1], u_b.shape[0], v_a.shape[0], core.shape[0], x.dtype(), threads);
  return true;
}

std::optional<bool> svd_lora_shrink_direct(py::handle h_, py::handle x_, py::handle v_a_, py::handle core_,
                                           py::handle s_a_, py::handle s_b_, py::handle offsets_, int threads) {
  Tensor h, x, v_a, core, s_a, s_b, offsets;
  Rows x_rows;
  if (!read({{h, h_}, {x, x_}, {v_a, v_a_}, {core, core_}, {s_a, s_a_}, {s_b, s_b_}, {offsets, offsets_}}) ||
      !shrink_fits(x, v_a, core, s_a, s_b, offsets, x_rows) || !h.is(cpu::kFloat32, {x_rows.count, core.shape[0]}))
    return std::nullopt;
  if (!runs_here(x, threads)) return false;
  svd_lora_shrink_cpu(h.address(), h.shape[1], x.address(), x_rows.stride, v_a.address(), core.address(),
                      s_a.address(), s_b.address(), offsets.address(), x_rows.count, s_b.shape[0], v_a.shape[1],
                      v_a.shape[0], core.shape[0], x.dtype(), threads);
  return true;
}

std::optional<bool> svd_lora_expand_direct(py::handle y_, py::handle h_, py::handle u_b_, int threads) {
  Tensor y, h, u_b;
  Rows y_rows, h_rows;
  if (!read({{y, y_}, {h, h_}, {u_b, u_b_}}) || h.ndim != 2 || h.dtype() != cpu::kFloat32 || !h_rows.take(h) ||
      !expand_fits(y, u_b, h.shape[1], h.shape[0], y_rows) || !h.is_beside(y))
    return std::nullopt;
  if (!runs_here(y, threads)) return false;
  svd_lora_expand_cpu(y.address(), y_rows.stride, h.address(), h_rows.stride, u_b.address(), u_b.strides[0],
                      u_b.strides[1], y_rows.count, u_b.shape[0], h.shape[1], y.dtype(), threads);
  return true;
}

// A thread's share of rows that draws the noise once; splitting more rows off costs less than leaving threads idle.
constexpr int64_t kRowsPerDraw = 256;

struct Group {
  int64_t member, first, rows;
  bool operator<(const Group& other) const { return member < other.member; }
};

// The rows of every pair, ascending in pairs. A pair with many rows comes in several parts.
std::vector<cpu::PairRows> pair_rows(const int64_t* members, const int64_t* offsets, int64_t count) {
  std::vector<Group> groups;
  groups.reserve(count);
  for (int64_t g = 0; g < count; ++g)
    if (offsets[g] < offsets[g + 1]) groups.push_back({members[g], offsets[g], offsets[g + 1] - offsets[g]});
  if (!std::is_sorted(groups.begin(), groups.end())) std::sort(groups.begin(), groups.end());
  std::vector<cpu::PairRows> parts;
  parts.reserve(groups.size());
  for (auto group = groups.begin(); group != groups.end();) {
    cpu::PairRows whole{static_cast<uint32_t>(group->member >> 1), {0, 0}, {0, 0}};
    for (; group != groups.end() && static_cast<uint32_t>(group->member >> 1) == whole.pair; ++group) {
      whole.first[group->member & 1] = group->first;
      whole.rows[group->member & 1] = group->rows;
    }
    for (int64_t at = 0; at < std::max(whole.rows[0], whole.rows[1]); at += kRowsPerDraw) {
      cpu::PairRows part{whole.pair, {whole.first[0] + at, whole.first[1] + at}, {}};
      for (int sign : {0, 1}) part.rows[sign] = std::clamp<int64_t>(whole.rows[sign] - at, 0, kRowsPerDraw);
      parts.push_back(part);
    }
  }
  return parts;
}

using PerturbedKernel = void (*)(const cpu::PerturbedArgs&, int64_t, int64_t);

void run_perturbed(cpu::PerturbedArgs& args, uintptr_t members, uintptr_t offsets, int64_t groups, int64_t rows,
                   int threads, PerturbedKernel shrink, PerturbedKernel expand) {
  py::gil_scoped_release release;
  const std::vector<cpu::PairRows> pairs = pair_rows(pointer<int64_t>(members), pointer<int64_t>(offsets), groups);
  const std::unique_ptr<float[]> h(new float[rows * args.rank]);
  args.pairs = pairs.data(), args.pair_count = static_cast<int64_t>(pairs.size());
  args.h = h.get();
  cpu::parallel_for(threads, args.pair_count * cpu::blocks(args.rank, cpu::kRanksAtOnce), 1,
                    [&](int64_t first, int64_t last) { shrink(args, first, last); });
  cpu::parallel_for(threads, args.pair_count * cpu::blocks(args.d_out, cpu::kColumnBlock), 1,
                    [&](int64_t first, int64_t last) { expand(args, first, last); });
}

void lora_perturbed_cpu(uintptr_t y, int64_t y_stride, uintptr_t x, int64_t x_stride, uintptr_t a, uintptr_t b,
                        int64_t b_row_stride, int64_t b_col_stride, uint64_t seed, uint32_t generation, uint32_t site,
                        double sigma, uintptr_t members, uintptr_t offsets, double scaling, bool rademacher,
                        int64_t rows, int64_t groups, int64_t d_in, int64_t d_out, int64_t rank, int dtype,
                        int parameter_dtype, int threads) {
  cpu::PerturbedArgs args{};
  args.dtype = dtype, args.parameter_dtype = parameter_dtype;
  args.d_in = d_in, args.d_out = d_out, args.rank = rank;
  args.x = pointer<void>(x), args.x_stride = x_stride;
  args.a = pointer<void>(a), args.b = pointer<void>(b);
  args.b_row_stride = b_row_stride, args.b_col_stride = b_col_stride;
  args.key = make_key(seed, generation, site, 0), args.rademacher = rademacher;
  args.sigma = static_cast<float>(sigma), args.scaling = static_cast<float>(scaling);
  args.y = pointer<void>(y), args.y_stride = y_stride;
  run_perturbed(args, members, offsets, groups, rows, threads, kernels->lora_perturbed_shrink,
                kernels->lora_perturbed_expand);
}

void lowrank_perturbed_cpu(uintptr_t y, int64_t y_stride, uintptr_t x, int64_t x_stride, uint64_t seed,
                           uint32_t generation, uint32_t site, double sigma, uintptr_t members, uintptr_t offsets,
                           int64_t rank, bool rademacher, int64_t rows, int64_t groups, int64_t d_in, int64_t d_out,
                           int dtype, int threads) {
  cpu::PerturbedArgs args{};
  args.dtype = dtype;
  args.d_in = d_in, args.d_out = d_out, args.rank = rank;
  args.x = pointer<void>(x), args.x_stride = x_stride;
  args.key = make_key(seed, generation, site, 0), args.rademacher = rademacher;
  args.scaling = static_cast<float>(sigma / std::sqrt(static_cast<double>(rank)));
  args.y = pointer<void>(y), args.y_stride = y_stride;
  run_perturbed(args, members, offsets, groups, rows, threads, kernels->lowrank_shrink, kernels->lowrank_expand);
}

// Distinct and of 33 bits.
bool are_members(const int64_t* members, int64_t count) {
  bool ascend = true;
  for (int64_t g = 1; g < count; ++g) ascend = ascend && members[g - 1] < members[g];
  std::vector<int64_t> sorted;
  if (!ascend) {
    sorted.assign(members, members + count);
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) return false;
    members = sorted.data();
  }
  return count == 0 || (members[0] >= 0 && members[count - 1] >> 33 == 0);
}

// x and y of the same leading dimensions, and the members of their rows.
bool perturbed_fits(const Tensor& y, const Tensor& x, const Tensor& members, const Tensor& offsets, Rows& x_rows,
                    Rows& y_rows) {
  if (x.dtype() < 0 || members.ndim != 1 || !x_rows.take(x) || !y_rows.take(y) || !matches(y, x)) return false;
  const int64_t groups = members.shape[0], d_in = x.shape[x.ndim - 1], d_out = y.shape[y.ndim - 1];
  return d_in * d_out > 0 && (y_rows.count < 2 || y_rows.stride >= d_out) && members.is(kInt64, {groups}) &&
         offsets.is(kInt64, {groups + 1}) && members.is_beside(x) && offsets.is_beside(x) &&
         (x.device_type != kCpuDevice || (are_members(pointer<int64_t>(members.address()), groups) &&
                                          cover(offsets, x_rows.count)));
}

// Within the noise's counter, whatever the distribution.
bool fits_counter(int64_t rank, int64_t d_in, int64_t d_out) {
  constexpr int64_t kMost = 1 << 28;
  return rank > 0 && rank < kMost / std::max(d_in, d_out);
}

std::optional<bool> lora_perturbed_direct(py::handle y_, py::handle x_, py::handle a_, py::handle b_,
                                          py::handle members_, py::handle offsets_, int64_t seed, uint32_t generation,
                                          uint32_t site, double sigma, double scaling, bool rademacher, int threads) {
  Tensor y, x, a, b, members, offsets;
  Rows x_rows, y_rows;
  if (!read({{y, y_}, {x, x_}, {a, a_}, {b, b_}, {members, members_}, {offsets, offsets_}}) ||
      !perturbed_fits(y, x, members, offsets, x_rows, y_rows) || a.ndim != 2 || b.ndim != 2)
    return std::nullopt;
  const int64_t rank = a.shape[0], d_in = x.shape[x.ndim - 1], d_out = y.shape[y.ndim - 1];
  const bool transposed = b.strides[0] == 1 && b.strides[1] == d_out;
  if ((a.dtype() != x.dtype() && a.dtype() != cpu::kFloat32) || !a.is(a.dtype(), {rank, d_in}) ||
      b.dtype() != a.dtype() || !b.has_shape({d_out, rank}) || !(b.is_contiguous() || transposed) ||
      !a.is_beside(x) || !b.is_beside(x) || !fits_counter(rank, d_in, d_out))
    return std::nullopt;
  if (!runs_here(y, threads)) return false;
  lora_perturbed_cpu(y.address(), y_rows.stride, x.address(), x_rows.stride, a.address(), b.address(), b.strides[0],
                     b.strides[1], static_cast<uint64_t>(seed), generation, site, sigma, members.address(),
                     offsets.address(), scaling, rademacher, x_rows.count, members.shape[0], d_in, d_out, rank,
                     x.dtype(), a.dtype(), threads);
  return true;
}

std::optional<bool> lowrank_perturbed_direct(py::handle y_, py::handle x_, py::handle members_, py::handle offsets_,
                                             int64_t d_out, int64_t seed, uint32_t generation, uint32_t site,
                                             double sigma, int64_t rank, bool rademacher, int threads) {
  Tensor y, x, members, offsets;
  Rows x_rows, y_rows;
  if (!read({{y, y_}, {x, x_}, {members, members_}, {offsets, offsets_}}) ||
      !perturbed_fits(y, x, members, offsets, x_rows, y_rows) || y.shape[y.ndim - 1] != d_out)
    return std::nullopt;
  const int64_t d_in = x.shape[x.ndim - 1];
  if (!fits_counter(rank, d_in, d_out)) return std::nullopt;
  if (!runs_here(y, threads)) return false;
  lowrank_perturbed_cpu(y.address(), y_rows.stride, x.address(), x_rows.stride, static_cast<uint64_t>(seed), generation,
                        site, sigma, members.address(), offsets.address(), rank, rademacher, x_rows.count,
                        members.shape[0], d_in, d_out, x.dtype(), threads);
  return true;
}

void lowrank_update_cpu(uintptr_t w, int64_t d_out, int64_t d_in, uint64_t seed, uint32_t generation, uint32_t site,
                        uintptr_t pair_weights, int64_t pairs, int64_t rank, bool rademacher, int dtype, int threads) {
  cpu::LowrankUpdateArgs args{};
  args.dtype = dtype, args.d_out = d_out, args.d_in = d_in, args.rank = rank;
  args.w = pointer<void>(w);
  args.key = make_key(seed, generation, site, 0), args.rademacher = rademacher;
  args.pair_weights = pointer<float>(pair_weights), args.pairs = pairs;
  py::gil_scoped_release release;
  cpu::parallel_for(threads, cpu::blocks(d_out, cpu::kTileRows) * cpu::blocks(d_in, cpu::kTileColumns), 1,
                    [&](int64_t first, int64_t last) { kernels->lowrank_update(args, first, last); });
}

// Runs perturb or es_update on a list of matrices; what else the arguments hold is the caller's.
void run_es_update(cpu::EsUpdateArgs& args, const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& rows,
                   const std::vector<int64_t>& cols, const std::vector<int>& dtypes, int threads,
                   void (*kernel)(const cpu::EsUpdateArgs&, int64_t, int64_t)) {
  const int tile = args.rademacher ? noise::kRademacherTile : noise::kGaussianTile;
  std::vector<cpu::NoisyMatrix> matrices;
  int64_t chunks = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    chunks += cpu::blocks(rows[i] * noise::tiles_per_row(cols[i], tile), cpu::kChunk / tile);
    const uint32_t site = args.key.site + 2 * static_cast<uint32_t>(i);
    matrices.push_back({dtypes[i], pointer<void>(tensors[i]), rows[i], cols[i], site, chunks});
  }
  args.matrices = matrices.data();
  py::gil_scoped_release release;
  cpu::parallel_for(threads, chunks, 1, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

void perturb_cpu(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& rows,
                 const std::vector<int64_t>& cols, const std::vector<int>& dtypes, uint64_t seed, uint32_t generation,
                 uint32_t site, uint64_t member, float sigma, bool rademacher, int threads) {
  cpu::EsUpdateArgs args{};
  args.key = make_key(seed, generation, site, member), args.rademacher = rademacher;
  args.sigma = (member & 1) != 0 ? -sigma : sigma;
  run_es_update(args, tensors, rows, cols, dtypes, threads, kernels->perturb);
}

void es_update_cpu(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& rows,
                   const std::vector<int64_t>& cols, const std::vector<int>& dtypes, uint64_t seed, uint32_t generation,
                   uint32_t site, uintptr_t pair_weights, int64_t pairs, bool rademacher, int threads) {
  cpu::EsUpdateArgs args{};
  args.key = make_key(seed, generation, site, 0), args.rademacher = rademacher;
  std::vector<uint32_t> numbers;
  std::vector<float> weights;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const float weight = pointer<float>(pair_weights)[pair];
    if (weight == 0.0f) continue;
    numbers.push_back(static_cast<uint32_t>(pair)), weights.push_back(weight);
  }
  args.pairs = numbers.data(), args.weights = weights.data(), args.pair_count = static_cast<int64_t>(weights.size());
  run_es_update(args, tensors, rows, cols, dtypes, threads, kernels->es_update);
}

#ifdef ESSA_WITH_CUDA
cuda::TensorList tensor_list(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& rows,
                             const std::vector<int64_t>& cols, const std::vector<int>& dtypes) {
  return {tensors.data(), rows.data(), cols.data(), dtypes.data(), static_cast<int64_t>(tensors.size())};
}

void perturb_cuda(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& rows,
                  const std::vector<int64_t>& cols, const std::vector<int>& dtypes, uint64_t seed, uint32_t generation,
                  uint32_t site, uint64_t member, float sigma, bool rademacher, uintptr_t stream) {
  cuda::perturb(tensor_list(tensors, rows, cols, dtypes), seed, generation, site, member, sigma, rademacher, stream);
}

void es_update_cuda(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& rows,
                    const std::vector<int64_t>& cols, const std::vector<int>& dtypes, uint64_t seed,
                    uint32_t generation, uint32_t site, uintptr_t pair_weights, int64_t pairs, bool rademacher,
                    uintptr_t stream) {
  cuda::es_update(tensor_list(tensors, rows, cols, dtypes), seed, generation, site, pair_weights, pairs, rademacher,
                  stream);
}
#endif

cpu::LinearLogprobArgs linear_logprob_args(uintptr_t hidden, int64_t hidden_stride, uintptr_t weight, uintptr_t labels,
                                           uintptr_t bias, uintptr_t selected, int64_t rows, int64_t d, int64_t vocab,
                                           bool capped, float inner, float outer, int dtype) {
  cpu::LinearLogprobArgs args{};
  args.dtype = dtype;
  args.rows = rows, args.d = d, args.vocab = vocab;
  args.hidden = pointer<void>(hidden), args.hidden_stride = hidden_stride;
  args.weight = pointer<void>(weight), args.labels = pointer<int64_t>(labels), args.bias = pointer<void>(bias);
  args.selected = pointer<int64_t>(selected);
  args.capped = capped, args.inner = inner, args.outer = outer;
  return args;
}

void linear_logprob_cpu(uintptr_t logprob, uintptr_t logsumexp, uintptr_t slope, uintptr_t hidden,
                        int64_t hidden_stride, uintptr_t weight, uintptr_t labels, uintptr_t bias, uintptr_t selected,
                        int64_t rows, int64_t d, int64_t vocab, bool capped, float inner, float outer, int dtype,
                        int threads) {
  cpu::LinearLogprobArgs args = linear_logprob_args(hidden, hidden_stride, weight, labels, bias, selected, rows, d,
                                                    vocab, capped, inner, outer, dtype);
  args.logprob = pointer<float>(logprob), args.logsumexp = pointer<float>(logsumexp);
  args.slope = pointer<void>(slope);
  py::gil_scoped_release release;
  cpu::parallel_for(threads, rows, kPanelGrain,
                    [&](int64_t first, int64_t last) { kernels->linear_logprob(args, first, last); });
}

void linear_logprob_head_cpu(uintptr_t d_weight, uintptr_t d_bias, uintptr_t grad, uintptr_t logprob,
                             uintptr_t logsumexp, uintptr_t hidden, int64_t hidden_stride, uintptr_t weight,
                             uintptr_t labels, uintptr_t bias, uintptr_t selected, int64_t rows, int64_t d,
                             int64_t vocab, bool capped, float inner, float outer, int dtype, int threads) {
  cpu::LinearLogprobArgs args = linear_logprob_args(hidden, hidden_stride, weight, labels, bias, selected, rows, d,
                                                    vocab, capped, inner, outer, dtype);
  args.d_weight = pointer<void>(d_weight), args.d_bias = pointer<void>(d_bias), args.grad = pointer<float>(grad);
  args.logprob = pointer<float>(logprob), args.logsumexp = pointer<float>(logsumexp);
  py::gil_scoped_release release;
  // Sized for the widest panel and the longest word; what is not written is not memory.
  const auto padded = [](int64_t n) { return (n + kPanelGrain - 1) / kPanelGrain * kPanelGrain; };
  const std::unique_ptr<float[]> panels(new float[padded(rows) * d]);
  const std::unique_ptr<float[]> across(new float[d_weight == 0 ? 0 : padded(d) * rows]);
  args.panels = panels.get(), args.hidden_across = across.get();
  kernels->linear_logprob_pack(args);
  cpu::parallel_for(threads, vocab, kVocabGrain,
                    [&](int64_t first, int64_t last) { kernels->linear_logprob_head(args, first, last); });
}

void linear_logprob_hidden_cpu(uintptr_t d_hidden, uintptr_t grad, uintptr_t slope, uintptr_t labels, int64_t rows,
                               int64_t d, int64_t ignore_index, int dtype, int threads) {
  cpu::LinearLogprobArgs args{};
  args.dtype = dtype, args.rows = rows, args.d = d, args.ignore_index = ignore_index;
  args.labels = pointer<int64_t>(labels), args.grad = pointer<float>(grad);
  args.slope = pointer<void>(slope), args.d_hidden = pointer<void>(d_hidden);
  py::gil_scoped_release release;
  cpu::parallel_for(threads, rows, kRowGrain,
                    [&](int64_t first, int64_t last) { kernels->linear_logprob_hidden(args, first, last); });
}

// Rows grouped by adapter, as the kernels of multi_lora take them. Every id stands for `repeat` rows in a row; -1 for
// rows without an adapter, which are left out.
struct AdapterRows {
  std::vector<int64_t> starts, order;
  std::vector<cpu::AdapterPart> parts;

  AdapterRows(const int64_t* ids, int64_t count, int64_t repeat, int64_t adapters) : starts(adapters + 1) {
    for (int64_t i = 0; i < count; ++i)
      if (ids[i] >= 0) starts[ids[i] + 1] += repeat;
    for (int64_t k = 0; k < adapters; ++k) {
      for (int64_t at = 0; at < starts[k + 1]; at += cpu::kPartRows)
        parts.push_back({k, starts[k] + at, std::min(cpu::kPartRows, starts[k + 1] - at)});
      starts[k + 1] += starts[k];
    }
    order.resize(starts.back() + kRowsAhead);
    std::vector<int64_t> next = starts;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t row = i * repeat; ids[i] >= 0 && row < (i + 1) * repeat; ++row) order[next[ids[i]]++] = row;
  }

  // More than any kernel prefetches.
  static constexpr int64_t kRowsAhead = 16;
};

using Addresses = std::vector<uintptr_t>;

// Every address is that of a stack of adapters of one rank, one after the other.
std::vector<cpu::Adapter> adapters_of(const Addresses& a, const Addresses& b, const Addresses& d_a,
                                      const Addresses& d_b, const std::vector<int64_t>& ranks, int64_t stack,
                                      uintptr_t scalings, double scaling, int64_t d_in, int64_t d_out, int dtype) {
  const int64_t size = dtype == cpu::kFloat32 ? 4 : 2;
  std::vector<cpu::Adapter> adapters;
  for (size_t i = 0; i < a.size(); ++i)
    for (int64_t k = 0; k < stack; ++k) {
      const int64_t of_a = k * ranks[i] * d_in * size, of_b = k * ranks[i] * d_out * size;
      const float own = scalings == 0 ? 1.0f : pointer<float>(scalings)[adapters.size()];
      adapters.push_back({pointer<void>(a[i] + of_a), pointer<void>(b[i] + of_b), ranks[i],
                          static_cast<float>(scaling) * own, d_a.empty() ? nullptr : pointer<void>(d_a[i] + of_a),
                          d_b.empty() ? nullptr : pointer<void>(d_b[i] + of_b)});
    }
  return adapters;
}

void multi_lora_cpu(uintptr_t y, int64_t y_stride, uintptr_t x, int64_t x_stride, const Addresses& a,
                    const Addresses& b, const std::vector<int64_t>& ranks, int64_t stack, uintptr_t ids, int64_t count,
                    int64_t repeat, uintptr_t scalings, double scaling, int64_t d_in, int64_t d_out, int dtype,
                    int parameter_dtype, int threads) {
  const std::vector<cpu::Adapter> adapters =
      adapters_of(a, b, {}, {}, ranks, stack, scalings, scaling, d_in, d_out, parameter_dtype);
  py::gil_scoped_release release;
  const AdapterRows rows(pointer<int64_t>(ids), count, repeat, static_cast<int64_t>(adapters.size()));
  cpu::MultiLoraArgs args{};
  args.dtype = dtype, args.parameter_dtype = parameter_dtype;
  args.d_in = d_in, args.d_out = d_out, args.most_ranks = *std::max_element(ranks.begin(), ranks.end());
  args.adapters = adapters.data();
  args.starts = rows.starts.data(), args.order = rows.order.data(), args.parts = rows.parts.data();
  args.x = {pointer<void>(x), x_stride}, args.y = {pointer<void>(y), y_stride};
  cpu::parallel_for(threads, static_cast<int64_t>(rows.parts.size()), 1,
                    [&](int64_t first, int64_t last) { kernels->multi_lora(args, first, last); });
}

// An adapter in every pair of matrices [r, d_in] and [d_out, r], or all of them in one pair of stacks of such.
struct StoredAdapters {
  Addresses a, b;
  std::vector<int64_t> ranks;
  int64_t stack = 1, d_in = 0, d_out = 0;
  int dtype = kOtherDType;

  // False where the lists are not that, or not beside x.
  bool take(const py::list& of_a, const py::list& of_b, const Tensor& x) {
    if (of_a.size() != of_b.size()) return false;
    bool stacked = false;
    for (size_t i = 0; i < of_a.size(); ++i) {
      Tensor one_a, one_b;
      if (!read({{one_a, of_a[i]}, {one_b, of_b[i]}}) || one_a.ndim < 2 || one_b.ndim < 2) return false;
      if (i == 0) {
        stacked = one_a.ndim == 3 && of_a.size() == 1;
        stack = stacked ? one_a.shape[0] : 1;
        d_in = one_a.shape[one_a.ndim - 1], d_out = one_b.shape[one_b.ndim - 2];
        dtype = one_a.dtype();
      }
      const int64_t rank = one_a.shape[one_a.ndim - 2];
      if (!(stacked ? one_a.is(dtype, {stack, rank, d_in}) && one_b.is(dtype, {stack, d_out, rank})
                    : one_a.is(dtype, {rank, d_in}) && one_b.is(dtype, {d_out, rank})) ||
          stack * rank * d_in * d_out < 1 || !one_a.is_beside(x) || !one_b.is_beside(x))
        return false;
      a.push_back(one_a.address()), b.push_back(one_b.address()), ranks.push_back(rank);
    }
    return !a.empty();
  }
};

// Whether every leading dimension of x, or the first few of them, has its ids.
bool ids_fit(const Tensor& ids, const Tensor& x, int64_t adapters) {
  if (ids.dtype() != kInt64 || !ids.is_contiguous() || ids.ndim < 1 || ids.ndim >= x.ndim || !ids.is_beside(x) ||
      !std::equal(ids.shape, ids.shape + ids.ndim, x.shape))
    return false;
  if (x.device_type != kCpuDevice) return true;
  const int64_t* values = pointer<int64_t>(ids.address());
  return std::all_of(values, values + ids.count(), [=](int64_t id) { return id >= -1 && id < adapters; });
}

std::optional<bool> multi_lora_direct(py::handle y_, py::handle x_, const py::list& a, const py::list& b,
                                      py::handle ids_, py::handle scalings_, double scaling, int threads) {
  Tensor y, x, ids, scalings;
  Rows x_rows, y_rows;
  StoredAdapters stored;
  if (!read({{y, y_}, {x, x_}, {ids, ids_}}) || x.dtype() < 0 || !x_rows.take(x) || !y_rows.take(y) ||
      !matches(y, x) || !stored.take(a, b, x) ||
      (stored.dtype != x.dtype() && stored.dtype != cpu::kFloat32) || x.shape[x.ndim - 1] != stored.d_in ||
      y.shape[y.ndim - 1] != stored.d_out || (x_rows.count > 1 && y_rows.stride < stored.d_out) || x_rows.count == 0)
    return std::nullopt;
  const int64_t adapters = static_cast<int64_t>(stored.a.size()) * stored.stack;
  if (!ids_fit(ids, x, adapters)) return std::nullopt;
  if (!scalings_.is_none() &&
      (!read({{scalings, scalings_}}) || !scalings.is(cpu::kFloat32, {adapters}) || !scalings.is_beside(x)))
    return std::nullopt;
  if (!runs_here(y, threads)) return false;
  multi_lora_cpu(y.address(), y_rows.stride, x.address(), x_rows.stride, stored.a, stored.b, stored.ranks, stored.stack,
                 ids.address(), ids.count(), x_rows.count / ids.count(),
                 scalings_.is_none() ? 0 : scalings.address(), scaling, stored.d_in, stored.d_out, x.dtype(),
                 stored.dtype, threads);
  return true;
}

void multi_lora_backward_cpu(uintptr_t d_x, int64_t d_x_stride, const Addresses& d_a, const Addresses& d_b,
                             uintptr_t d_y, int64_t d_y_stride, uintptr_t x, int64_t x_stride, const Addresses& a,
                             const Addresses& b, const std::vector<int64_t>& ranks, int64_t stack, uintptr_t ids,
                             int64_t count, int64_t repeat, uintptr_t scalings, double scaling, int64_t d_in,
                             int64_t d_out, int dtype, int parameter_dtype, int threads) {
  const std::vector<cpu::Adapter> adapters =
      adapters_of(a, b, d_a, d_b, ranks, stack, scalings, scaling, d_in, d_out, parameter_dtype);
  py::gil_scoped_release release;
  const AdapterRows rows(pointer<int64_t>(ids), count, repeat, static_cast<int64_t>(adapters.size()));
  cpu::MultiLoraArgs args{};
  args.dtype = dtype, args.parameter_dtype = parameter_dtype;
  args.d_in = d_in, args.d_out = d_out, args.most_ranks = *std::max_element(ranks.begin(), ranks.end());
  args.adapters = adapters.data();
  args.starts = rows.starts.data(), args.order = rows.order.data(), args.parts = rows.parts.data();
  args.x = {pointer<void>(x), x_stride};
  args.d_x = {pointer<void>(d_x), d_x_stride}, args.d_y = {pointer<void>(d_y), d_y_stride};
  const int64_t hidden = rows.starts.back() * args.most_ranks;
  const std::unique_ptr<float[]> h(d_b.empty() ? nullptr : new float[hidden]);
  const std::unique_ptr<float[]> g(d_a.empty() && d_x == 0 ? nullptr : new float[hidden]);
  args.h = h.get(), args.g = g.get();
  cpu::parallel_for(threads, static_cast<int64_t>(rows.parts.size()), 1,
                    [&](int64_t first, int64_t last) { kernels->multi_lora_backward_rows(args, first, last); });
  const int64_t blocks = cpu::blocks(d_in, cpu::kGradientColumns) + cpu::blocks(d_out, cpu::kGradientColumns);
  if (d_a.empty() && d_b.empty()) return;
  cpu::parallel_for(threads, static_cast<int64_t>(adapters.size()) * blocks, 1,
                    [&](int64_t first, int64_t last) { kernels->multi_lora_backward_factors(args, first, last); });
}

void decode_attention_cpu(uintptr_t out, uintptr_t query, int64_t query_row, int64_t query_head, uintptr_t key,
                          int64_t key_row, int64_t key_head, int64_t key_position, uintptr_t value, int64_t value_row,
                          int64_t value_head, int64_t value_position, uintptr_t mask, int64_t mask_row, double scale,
                          int64_t rows, int64_t heads, int64_t kv_heads, int64_t length, int64_t d, int64_t d_v,
                          int dtype, int threads) {
  cpu::DecodeAttentionArgs args{};
  args.dtype = dtype;
  args.rows = rows, args.heads = heads, args.kv_heads = kv_heads, args.length = length, args.d = d, args.d_v = d_v;
  args.query = pointer<void>(query), args.query_row = query_row, args.query_head = query_head;
  args.key = pointer<void>(key), args.key_row = key_row, args.key_head = key_head, args.key_position = key_position;
  args.value = pointer<void>(value), args.value_row = value_row, args.value_head = value_head;
  args.value_position = value_position;
  args.mask = pointer<uint8_t>(mask), args.mask_row = mask_row;
  args.scale = static_cast<float>(scale), args.out = pointer<void>(out);
  py::gil_scoped_release release;
  cpu::parallel_for(threads, rows * kv_heads, 1,
                    [&](int64_t first, int64_t last) { kernels->decode_attention(args, first, last); });
}

py::dict build_info() {
  py::dict info;
  info["noise_version"] = noise::kVersion;
  info["compiled_isas"] = cpu::compiled_isas();
  info["cpu_isa"] = kernels->isa;
  info["cpu_features"] = cpu::cpu_features();
  info["thread_pool"] = cpu::thread_pool();
#ifdef ESSA_WITH_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = ESSA_CUDA_ARCHS;
  info["cuda_version"] = ESSA_CUDA_VERSION;
  char devices[2048];
  cuda::device_report(devices, sizeof devices);
  info["cuda_device"] = devices;
#else
  info["cuda"] = false;
#endif
  info["compiler"] = ESSA_COMPILER;
  return info;
}

}  // namespace
}  // namespace essa

PYBIND11_MODULE(_C, m) {
  using namespace essa;
  const char* limit = std::getenv("ESSA_CPU_ISA");
  kernels = &cpu::choose_kernels(limit == nullptr ? "" : limit);
  m.def("build_info", &build_info);
  m.def("use_exchange", &use_exchange);
  m.def("svd_lora_direct", &svd_lora_direct);
  m.def("svd_lora_shrink_direct", &svd_lora_shrink_direct);
  m.def("svd_lora_expand_direct", &svd_lora_expand_direct);
  m.def("lora_perturbed_direct", &lora_perturbed_direct);
  m.def("lowrank_perturbed_direct", &lowrank_perturbed_direct);
  m.def("multi_lora_direct", &multi_lora_direct);
  m.def("decode_attention_cpu", &decode_attention_cpu);
  m.def("gaussian_cpu", &gaussian_cpu);
  m.def("rademacher_cpu", &rademacher_cpu);
  m.def("linear_logprob_cpu", &linear_logprob_cpu);
  m.def("linear_logprob_head_cpu", &linear_logprob_head_cpu);
  m.def("linear_logprob_hidden_cpu", &linear_logprob_hidden_cpu);
  m.def("svd_lora_cpu", &svd_lora_cpu);
  m.def("svd_lora_shrink_cpu", &svd_lora_shrink_cpu);
  m.def("svd_lora_expand_cpu", &svd_lora_expand_cpu);
  m.def("multi_lora_cpu", &multi_lora_cpu);
  m.def("multi_lora_backward_cpu", &multi_lora_backward_cpu);
  m.def("lora_perturbed_cpu", &lora_perturbed_cpu);
  m.def("lowrank_perturbed_cpu", &lowrank_perturbed_cpu);
  m.def("lowrank_update_cpu", &lowrank_update_cpu);
  m.def("perturb_cpu", &perturb_cpu);
  m.def("es_update_cpu", &es_update_cpu);
#ifdef ESSA_WITH_CUDA
  m.def("gaussian_cuda", &cuda::gaussian);
  m.def("rademacher_cuda", &cuda::rademacher);
  m.def("perturb_cuda", &perturb_cuda);
  m.def("es_update_cuda", &es_update_cuda);
  m.def("lora_perturbed_cuda", &cuda::lora_perturbed);
  m.def("svd_lora_cuda", &cuda::svd_lora);
  m.def("svd_lora_shrink_cuda", &cuda::svd_lora_shrink);
  m.def("svd_lora_expand_cuda", &cuda::svd_lora_expand);
#endif
}
