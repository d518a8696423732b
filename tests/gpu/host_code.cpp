// csrc/cuda's device code on the host, for tests: the same headers, with the hardware's threads, barriers, warp
// shuffles and shared memory emulated. Every thread is a fiber; a barrier yields to the next one.
#include <ucontext.h>

#include <cmath>
#include <memory>
#include <vector>

#include "cuda/es_update_thread.h"
#include "cuda/lora_perturbed_block.h"
#include "cuda/noise_fill.h"
#include "cuda/svd_lora_block.h"

namespace {

using namespace essa;

// Fibers

constexpr size_t kStack = 64 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool finished = false;
};

std::vector<Fiber>* fibers;
size_t running;
ucontext_t caller;
void (*fiber_body)(size_t);

void yield() {
  Fiber& self = (*fibers)[running];
  for (size_t step = 1; step <= fibers->size(); ++step) {
    const size_t next = (running + step) % fibers->size();
    if ((*fibers)[next].finished) continue;
    if (next == running) return;
    running = next;
    swapcontext(&self.context, &(*fibers)[next].context);
    return;
  }
  setcontext(&caller);
}

void fiber_entry() {
  fiber_body(running);
  (*fibers)[running].finished = true;
  yield();
}

void run_fibers(size_t count, void (*body)(size_t)) {
  std::vector<Fiber> all(count);
  fibers = &all;
  fiber_body = body;
  for (Fiber& fiber : all) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, fiber_entry, 0);
  }
  running = 0;
  swapcontext(&caller, &all[0].context);
}

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  uint64_t arrive() {
    const uint64_t token = generation;
    if (++arrived == expected) arrived = 0, ++generation;
    return token;
  }
  void wait(uint64_t token) {
    while (generation == token) yield();
  }
  void sync() { wait(arrive()); }
};

// The blocks that share a row block

struct Geometry {
  int threads, parts;
  bool cluster;
};

struct Warp {
  Barrier barrier;
  float values[cuda::kWarp];
};

struct BlockState {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<float> shared;
};

struct RowBlock {
  Geometry geometry;
  int64_t index;
  Barrier cluster;
  std::vector<BlockState> blocks;
};

RowBlock* row_block_state;

class HostBlock {
 public:
  HostBlock(RowBlock& row_block, size_t fiber)
      : row_block_(row_block),
        thread_((int)(fiber % row_block.geometry.threads)),
        part_((int)(fiber / row_block.geometry.threads)) {}
  int thread() const { return thread_; }
  int threads() const { return row_block_.geometry.threads; }
  int64_t row_block() const { return row_block_.index; }
  int outer_part() const { return part_; }
  int outer_parts() const { return row_block_.geometry.parts; }
  int inner_part() const { return row_block_.geometry.cluster ? part_ : 0; }
  int inner_parts() const { return row_block_.geometry.cluster ? row_block_.geometry.parts : 1; }
  float* shared() const { return state().shared.data(); }
  const float* shared_of(int part) const {
    return row_block_.blocks[row_block_.geometry.cluster ? part : part_].shared.data();
  }
  void sync() const { state().barrier.sync(); }
  void cluster_sync() const { row_block_.geometry.cluster ? row_block_.cluster.sync() : sync(); }
  void cluster_arrive() const {
    if (row_block_.geometry.cluster) token_ = row_block_.cluster.arrive();
  }
  void cluster_wait() const {
    if (row_block_.geometry.cluster) row_block_.cluster.wait(token_);
  }
  float warp_sum(float value) const {
    Warp& warp = state().warps[thread_ / cuda::kWarp];
    const int lane = thread_ % cuda::kWarp;
    for (int distance = cuda::kWarp / 2; distance > 0; distance /= 2) {
      warp.values[lane] = value;
      warp.barrier.sync();
      value += warp.values[lane ^ distance];
      warp.barrier.sync();
    }
    return value;
  }

 private:
  BlockState& state() const { return row_block_.blocks[part_]; }
  RowBlock& row_block_;
  int thread_, part_;
  mutable uint64_t token_ = 0;
};

template <class P, void (*Body)(const HostBlock&, const P&)>
void launch(const P& p, Geometry geometry, int64_t row_blocks, int shared_floats) {
  static const P* arguments;
  arguments = &p;
  const int warps = geometry.threads / cuda::kWarp;
  for (int64_t index = 0; index < row_blocks; ++index) {
    RowBlock row_block{geometry, index, {}, std::vector<BlockState>(geometry.parts)};
    row_block.cluster.expected = geometry.threads * geometry.parts;
    for (BlockState& block : row_block.blocks) {
      block.barrier.expected = geometry.threads;
      block.warps.resize(warps);
      for (Warp& warp : block.warps) warp.barrier.expected = cuda::kWarp;
      block.shared.assign(shared_floats, NAN);
    }
    row_block_state = &row_block;
    run_fibers((size_t)geometry.threads * geometry.parts,
               [](size_t fiber) { Body(HostBlock(*row_block_state, fiber), *arguments); });
  }
}

template <int R, class T>
void run_op(int op, const cuda::SvdLora<T>& p, Geometry geometry) {
  using P = cuda::SvdLora<T>;
  const int64_t row_blocks = (p.rows + R - 1) / R;
  const int floats = cuda::shared_layout(R, p.r_a, p.r_b, geometry.threads / cuda::kWarp).total;
  if (op == 0) launch<P, cuda::svd_lora_block<R, T, HostBlock>>(p, geometry, row_blocks, floats);
  if (op == 1) launch<P, cuda::svd_lora_shrink_block<R, T, HostBlock>>(p, geometry, row_blocks, floats);
  if (op == 2) launch<P, cuda::svd_lora_expand_block<R, T, HostBlock>>(p, geometry, row_blocks, floats);
}

template <int R, class T, class P>
void run_perturbed(const cuda::LoraPerturbed<T, P>& p, Geometry geometry) {
  const int floats = cuda::perturbed_layout(R, p.rank, geometry.threads / cuda::kWarp).total;
  launch<cuda::LoraPerturbed<T, P>, cuda::lora_perturbed_block<R, T, P, HostBlock>>(p, geometry, p.groups, floats);
}

}  // namespace

extern "C" {

void fill(int rademacher, float* out, int64_t rows, int64_t cols, uint64_t seed, uint32_t generation, uint32_t site,
          uint64_t member) {
  const int tile = rademacher ? noise::kRademacherTile : noise::kGaussianTile;
  const cuda::Fill fill = cuda::make_fill(out, rows, cols, seed, generation, site, member, tile);
  const int threads = rademacher ? cuda::kRademacherThreadsPerTile : cuda::kGaussianThreadsPerTile;
  // One thread too many: the last block of a grid has idle ones.
  for (uint64_t index = 0; index <= (uint64_t)fill.tiles * threads; ++index)
    rademacher ? cuda::rademacher_thread(fill, index) : cuda::gaussian_thread(fill, index);
}

// perturb_ with `pair_weights` null, else es_update_, of a list in one launch.
void es_update(int rademacher, int count, void* const* data, const int64_t* rows, const int64_t* cols,
               const int* dtypes, uint64_t seed, uint32_t generation, uint32_t site, uint64_t member, float sigma,
               const float* pair_weights, uint32_t pairs) {
  const int tile = rademacher ? noise::kRademacherTile : noise::kGaussianTile;
  cuda::EsUpdate p = {};
  uint32_t end = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t tiles_per_row = noise::tiles_per_row(cols[i], tile);
    end += (uint32_t)(rows[i] * tiles_per_row);
    p.tensors[p.count++] = {data[i], cols[i], (uint32_t)tiles_per_row, end, site + 2 * (uint32_t)i, dtypes[i]};
  }
  p.key = {(uint32_t)seed, (uint32_t)(seed >> 32), site, (uint32_t)(member >> 1), generation};
  p.sigma = member & 1 ? -sigma : sigma;
  p.pair_weights = pair_weights, p.pairs = pairs;
  const int threads = rademacher ? cuda::kRademacherUpdateThreads : cuda::kGaussianUpdateThreads;
  for (uint64_t index = 0; index <= (uint64_t)end * threads; ++index) {
    if (pair_weights == nullptr) {
      rademacher ? cuda::perturb_rademacher_thread(p, index) : cuda::perturb_gaussian_thread(p, index);
    } else {
      rademacher ? cuda::update_rademacher_thread(p, index) : cuda::update_gaussian_thread(p, index);
    }
  }
}

// op: 0 svd_lora, 1 shrink, 2 expand. dtype as in essa_cuda.h.
void svd_lora(int op, uintptr_t y, int64_t y_stride, uintptr_t x, int64_t x_stride, uintptr_t v_a, uintptr_t core,
              uintptr_t u_b, int64_t u_b_row_stride, int64_t u_b_column_stride, uintptr_t s_a, uintptr_t s_b,
              uintptr_t offsets, uintptr_t h, int64_t h_stride, int64_t rows, int64_t members, int64_t d_in,
              int64_t d_out, int64_t r_a, int64_t r_b, int dtype, int rows_per_block, int threads, int parts,
              int cluster) {
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    cuda::SvdLora<T> p = {};
    p.rows = rows;
    p.h = reinterpret_cast<float*>(h);
    p.h_stride = h_stride;
    cuda::set_inputs(p, x, x_stride, v_a, core, s_a, s_b, offsets, members, d_in, r_a, r_b);
    cuda::set_outputs(p, y, y_stride, u_b, u_b_row_stride, u_b_column_stride, d_out, r_b);
    const Geometry geometry{threads, parts, cluster != 0};
    rows_per_block == 1 ? run_op<1>(op, p, geometry) : run_op<4>(op, p, geometry);
  };
  if (dtype == 0) run(float());
  if (dtype == 1) run(cuda::BFloat16());
  if (dtype == 2) run(cuda::Float16());
}

// parameter_dtype: 0 or dtype
void lora_perturbed(uintptr_t y, int64_t y_stride, uintptr_t x, int64_t x_stride, uintptr_t a, uintptr_t b,
                    int64_t b_row_stride, int64_t b_column_stride, uint64_t seed, uint32_t generation, uint32_t site,
                    double sigma, uintptr_t members, uintptr_t offsets, double scaling, int rademacher, int64_t groups,
                    int64_t d_in, int64_t d_out, int64_t rank, int dtype, int parameter_dtype, int rows_at_once,
                    int threads, int parts, int cluster) {
  const auto run = [&](auto x_tag, auto parameter_tag) {
    using T = decltype(x_tag);
    using P = decltype(parameter_tag);
    cuda::LoraPerturbed<T, P> p = {};
    p.y = reinterpret_cast<T*>(y), p.y_stride = y_stride;
    p.x = reinterpret_cast<const T*>(x), p.x_stride = x_stride;
    p.a = reinterpret_cast<const P*>(a), p.b = reinterpret_cast<const P*>(b);
    p.b_row_stride = b_row_stride, p.b_column_stride = b_column_stride;
    p.members = reinterpret_cast<const int64_t*>(members), p.offsets = reinterpret_cast<const int64_t*>(offsets);
    p.groups = (int)groups, p.d_in = (int)d_in, p.d_out = (int)d_out, p.rank = (int)rank;
    p.sigma = (float)sigma, p.scaling = (float)scaling, p.rademacher = rademacher != 0;
    p.key = noise::Key{(uint32_t)seed, (uint32_t)(seed >> 32), site, 0, generation};
    const Geometry geometry{threads, parts, cluster != 0};
    rows_at_once == 1 ? run_perturbed<2>(p, geometry) : run_perturbed<4>(p, geometry);
  };
  const auto with_parameters = [&](auto tag) { parameter_dtype == 0 ? run(tag, float()) : run(tag, tag); };
  if (dtype == 0) with_parameters(float());
  if (dtype == 1) with_parameters(cuda::BFloat16());
  if (dtype == 2) with_parameters(cuda::Float16());
}
}
