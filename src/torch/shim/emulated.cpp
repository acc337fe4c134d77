// Runs the kernels of gpu.cu on a CPU, for tests where there is no GPU: the same text, compiled for the host.
//
// A block's threads are coroutines of the calling thread. Warps run one after the other, each as far as it gets, so a
// barrier that is missing between two warps shows: one has gone on, the other has not begun. Every second block runs
// its warps in the opposite order. A barrier that only a part of the threads reaches is an error. Blocks run one after
// the other.
//
// Only in programs that are made without CUDA, and for development.
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include <c10/util/Exception.h>

#include "gpu_args.h"
#include "launch.h"

namespace trainer {
namespace {

struct Place {
  unsigned x = 0, y = 0;
};

enum class At { kRunning, kExchange, kBarrier, kEnd };

constexpr size_t kThreads = TRAINER_THREADS, kLanes = 32, kStack = 64 << 10;

// The block that runs. One at a time in the process: what its threads share is static.
struct Block {
  Place thread, block, grid;
  std::array<ucontext_t, kThreads> contexts;
  std::array<At, kThreads> at;
  std::array<float, kThreads> exchanged;
  std::unique_ptr<char[]> stacks{new char[kThreads * kStack]};
  ucontext_t scheduler;
  void (*kernel)(const void*) = nullptr;
  const void* args = nullptr;
  bool misaligned = false;
};

Block& block() {
  static Block only;
  return only;
}

// Lets others run until this thread may go on.
void stop_at(At where) {
  auto& b = block();
  const auto own = b.thread.x;
  b.at[own] = where;
  swapcontext(&b.contexts[own], &b.scheduler);
}

void run_thread() {
  auto& b = block();
  b.kernel(b.args);
  b.at[b.thread.x] = At::kEnd;
  // The context that follows it is the scheduler's.
}

// Runs a warp until each of its lanes is at the barrier of the block, or at its end.
void run_warp(size_t warp) {
  auto& b = block();
  const auto begin = warp * kLanes;
  for (;;) {
    size_t exchanging = 0;
    for (auto lane = begin; lane < begin + kLanes; ++lane) {
      if (b.at[lane] == At::kRunning) {
        b.thread.x = static_cast<unsigned>(lane);
        swapcontext(&b.scheduler, &b.contexts[lane]);
      }
      exchanging += b.at[lane] == At::kExchange ? 1 : 0;
    }
    TORCH_CHECK(exchanging == 0 || exchanging == kLanes, "lanes of a warp part before an exchange");
    if (exchanging == 0) {
      return;
    }
    for (auto lane = begin; lane < begin + kLanes; ++lane) {
      b.at[lane] = At::kRunning;
    }
  }
}

void run_block(bool backwards) {
  auto& b = block();
  for (size_t thread = 0; thread < kThreads; ++thread) {
    getcontext(&b.contexts[thread]);
    b.contexts[thread].uc_stack.ss_sp = b.stacks.get() + thread * kStack;
    b.contexts[thread].uc_stack.ss_size = kStack;
    b.contexts[thread].uc_link = &b.scheduler;
    makecontext(&b.contexts[thread], run_thread, 0);
    b.at[thread] = At::kRunning;
  }
  for (;;) {
    for (size_t warp = 0; warp < kThreads / kLanes; ++warp) {
      run_warp(backwards ? kThreads / kLanes - 1 - warp : warp);
    }
    size_t ended = 0;
    for (auto& at : b.at) {
      ended += at == At::kEnd ? 1 : 0;
      at = at == At::kEnd ? at : At::kRunning;
    }
    TORCH_CHECK(ended == 0 || ended == kThreads, "threads of a block part before a barrier");
    if (ended == kThreads) {
      return;
    }
  }
}

// Notes an access that is not aligned. This machine makes it all the same.
void look_at(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    block().misaligned = true;
  }
}

// What gpu.cu has from its language.

#define __device__
#define __shared__ static
#define threadIdx (block().thread)
#define blockIdx (block().block)
#define gridDim (block().grid)
#define TRAINER_GLOBAL static
#define TRAINER_ALIGNED(pointer, bytes) look_at(pointer, bytes)
#pragma GCC diagnostic ignored "-Wunused-parameter"

void __syncthreads() {
  stop_at(At::kBarrier);
}

float __shfl_xor_sync(unsigned, float value, int mask) {
  auto& b = block();
  const auto own = b.thread.x;
  b.exchanged[own] = value;
  stop_at(At::kExchange);
  const float other = b.exchanged[own ^ static_cast<unsigned>(mask)];
  // Nobody writes the next value before all have read this one.
  stop_at(At::kExchange);
  return other;
}

float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

#include "gpu.cu"

#undef threadIdx
#undef blockIdx
#undef gridDim

using Emulated = void (*)(const void*);

template <class Args, void (*kernel)(const Args)>
void with_args(const void* args) {
  kernel(*static_cast<const Args*>(args));
}

#define EMULATED(name, Args) with_args<Args, name>
#define EMULATED_FORMS(name, Args) \
  EMULATED(name##_f32, Args), EMULATED(name##_f32_wide, Args), EMULATED(name##_bf16, Args), \
      EMULATED(name##_bf16_wide, Args)

// In the order of kKernelNames and kFormNames.
constexpr Emulated kEmulated[] = {
    EMULATED_FORMS(rms_norm, RmsNormArgs),
    EMULATED_FORMS(rms_norm_backward, RmsNormBackwardArgs),
    EMULATED(rms_norm_weight_f32, RmsNormWeightArgs), nullptr,
    EMULATED(rms_norm_weight_bf16, RmsNormWeightArgs), nullptr,
    EMULATED(add_up_f32, AddUpArgs), nullptr, nullptr, nullptr,
    EMULATED_FORMS(rotate, RotateArgs),
    EMULATED_FORMS(silu, GateArgs),
    EMULATED_FORMS(silu_backward, GateBackwardArgs),
    EMULATED_FORMS(gelu, GateArgs),
    EMULATED_FORMS(gelu_backward, GateBackwardArgs),
    EMULATED_FORMS(cross_entropy, CrossEntropyArgs),
};
static_assert(sizeof(kEmulated) / sizeof(kEmulated[0]) == kKernelCount * kForms);

} // namespace

void emulate(size_t number, uint32_t across, uint32_t down, const void* args) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  auto& b = block();
  b.kernel = kEmulated[number];
  TORCH_CHECK(b.kernel != nullptr, "there is no kernel ", number);
  b.args = args;
  b.grid = {across, down};
  b.misaligned = false;
  for (uint32_t y = 0; y < down; ++y) {
    for (uint32_t x = 0; x < across; ++x) {
      b.block = {x, y};
      run_block((x + y) % 2 == 1);
    }
  }
  TORCH_CHECK(!b.misaligned, "kernel ", number, " has made an access that is not aligned");
}

} // namespace trainer
