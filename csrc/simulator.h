// Runs CUDA source on the CPU: a fiber for every thread, one block after another.
//
// It finds missing and divergent barriers, warp operations whose mask leaves the caller out or that
// lanes do not reach together, writes beyond dynamic shared memory, and reads of shared memory that
// nothing wrote (it starts as NaNs). Threads run in forward, reverse or shuffled order: a result
// that depends on it is a race. It says nothing of memory order, occupancy or speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define NVMM_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(nvmm::simulator::block->shared.data())
#define NVMM_LAUNCH(kernel, grid, block, shared, tensor, ...) \
  nvmm::simulator::launch((grid), (block), (shared), [&] { kernel(__VA_ARGS__); })

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned count() const { return x * y * z; }
};

namespace nvmm::simulator {

constexpr size_t stack_bytes = 64 << 10;
constexpr size_t guard_bytes = 256;
constexpr unsigned char poison = 0xff;  // floats and halves read it as NaN
constexpr unsigned char guard = 0xa5;

enum class Order : int64_t { forward, reverse, shuffled };

struct Settings {
  Order order = Order::forward;
  unsigned threads = 0;  // of every block; 0 leaves it to the launch
};
inline Settings settings;

enum class State { ready, at_barrier, at_exchange, done };

struct Fiber {
  ucontext_t context;
  dim3 thread;
  unsigned index;
  State state;
};

// One warp operation in flight: every lane of `mask` posts a value, then all read.
struct Exchange {
  uint32_t mask = 0, arrived = 0;
  unsigned generation = 0;
  float values[2][32];
};

struct Block {
  dim3 grid, size, index;
  std::vector<Fiber> fibers;
  std::vector<Exchange> warps;
  std::vector<unsigned char> shared;
  std::unique_ptr<unsigned char[]> stacks;
  unsigned waiting = 0, generation = 0;
  std::string fault;
  ucontext_t scheduler;
  const std::function<void()>* body;
};
inline Block* block;
inline Fiber* fiber;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("simulator: " + what);
}

inline void pause(State state) {
  fiber->state = state;
  Fiber* self = fiber;
  swapcontext(&self->context, &block->scheduler);
}

inline void barrier() {
  const unsigned generation = block->generation;
  if (++block->waiting == block->fibers.size()) {
    block->waiting = 0;
    ++block->generation;
    return;
  }
  while (block->generation == generation) pause(State::at_barrier);
}

// Every lane of `mask` gives `value`; returns the 32 values, which stay until the next but one.
inline const float* exchange(uint32_t mask, float value) {
  Exchange& warp = block->warps[fiber->index / 32];
  const uint32_t lane = 1u << fiber->index % 32;
  if (!(mask & lane)) fail("a lane calls a warp operation with a mask that leaves it out");
  if (warp.arrived && warp.mask != mask) fail("lanes of a warp disagree about the mask");
  warp.mask = mask;
  warp.arrived |= lane;
  const unsigned generation = warp.generation;
  float* values = warp.values[generation % 2];
  values[fiber->index % 32] = value;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.generation;
    return values;
  }
  while (warp.generation == generation) pause(State::at_exchange);
  return values;
}

inline void enter() {
  try {
    (*block->body)();
  } catch (const std::exception& error) {
    if (block->fault.empty()) block->fault = error.what();
  }
  pause(State::done);
}

inline std::vector<unsigned> ordered(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  if (settings.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (settings.order == Order::shuffled) {
    std::shuffle(order.begin(), order.end(), std::mt19937(count));
  }
  return order;
}

inline void prepare(Block& b) {
  b.waiting = b.generation = 0;
  b.warps.assign((b.fibers.size() + 31) / 32, Exchange{});
  std::fill(b.shared.begin(), b.shared.end() - guard_bytes, poison);
  std::fill(b.shared.end() - guard_bytes, b.shared.end(), guard);
  for (unsigned i = 0; i < b.fibers.size(); ++i) {
    Fiber& f = b.fibers[i];
    f.index = i;
    f.state = State::ready;
    f.thread = dim3(i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y));
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = b.stacks.get() + i * stack_bytes;
    f.context.uc_stack.ss_size = stack_bytes;
    makecontext(&f.context, enter, 0);
  }
}

inline bool can_run(const Block& b, const Fiber& f, unsigned seen) {
  return f.state == State::ready || f.state == State::at_exchange ||
         (f.state == State::at_barrier && b.generation != seen);
}

inline unsigned progress(const Block& b) {
  unsigned sum = b.generation;
  for (const Exchange& warp : b.warps) sum += warp.generation + std::popcount(warp.arrived);
  return sum;
}

inline void run(Block& b) {
  prepare(b);
  const std::vector<unsigned> order = ordered(b.fibers.size());
  for (size_t left = b.fibers.size(); left;) {
    const unsigned before = progress(b) + b.waiting;
    const unsigned generation = b.generation;
    const size_t had = left;
    for (unsigned i : order) {
      Fiber& f = b.fibers[i];
      if (f.state == State::done) continue;
      fiber = &f;
      swapcontext(&b.scheduler, &f.context);
      if (!b.fault.empty()) throw std::runtime_error(b.fault);
      if (f.state != State::done) continue;
      --left;
      if (b.waiting) fail("a thread ended while others wait in __syncthreads (divergent barrier)");
    }
    if (had == left && before == progress(b) + b.waiting && generation == b.generation) {
      fail("deadlock: no thread can go on (divergent barrier or warp operation)");
    }
  }
  for (auto byte = b.shared.end() - guard_bytes; byte != b.shared.end(); ++byte) {
    if (*byte != guard) fail("a thread wrote beyond the dynamic shared memory");
  }
}

inline void launch(dim3 grid, dim3 size, size_t shared, const std::function<void()>& body) {
  if (!grid.count() || !size.count() || size.count() > 1024 || shared > 227 << 10) {
    fail("launch configuration");
  }
  Block b;
  b.grid = grid;
  b.size = size;
  b.body = &body;
  b.fibers.resize(size.count());
  b.shared.resize(shared + guard_bytes);
  b.stacks.reset(new unsigned char[size.count() * stack_bytes]);
  block = &b;
  for (unsigned i : ordered(grid.count())) {
    b.index = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
    run(b);
  }
}

}  // namespace nvmm::simulator

#define threadIdx (nvmm::simulator::fiber->thread)
#define blockIdx (nvmm::simulator::block->index)
#define blockDim (nvmm::simulator::block->size)
#define gridDim (nvmm::simulator::block->grid)

inline void __syncthreads() { nvmm::simulator::barrier(); }

inline float __shfl_xor_sync(uint32_t mask, float value, int offset) {
  const unsigned from = nvmm::simulator::fiber->index % 32 ^ offset;
  return nvmm::simulator::exchange(mask, value)[from];
}

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
