// Moments of a step: on the CPU times of a clock, on a GPU events in the compute stream, which nobody waits for. And
// what the device and its allocator say of themselves.
#include "shim.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>

#include <ATen/ATen.h>

#ifdef TRAINER_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

namespace trainer {
namespace {

// Marks by number. One thread uses them at a time: the caller's, or the one that runs a backward pass for it.
struct Marks {
  Marks(at::Device where, size_t count) : device(where) {
    if (device.is_cpu()) {
      times.resize(count);
      return;
    }
#ifdef TRAINER_CUDA
    events.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      events.emplace_back(cudaEventDefault);
    }
#else
    TORCH_CHECK(false, "built without CUDA");
#endif
  }

  size_t count() const {
#ifdef TRAINER_CUDA
    if (!device.is_cpu()) {
      return events.size();
    }
#endif
    return times.size();
  }

  void mark(size_t index) {
    TORCH_CHECK(index < count(), "mark ", index, " of ", count());
#ifdef TRAINER_CUDA
    if (!device.is_cpu()) {
      events[index].record(c10::cuda::getCurrentCUDAStream(device.index()));
      return;
    }
#endif
    times[index] = std::chrono::steady_clock::now();
  }

  double seconds(size_t from, size_t to) const {
    TORCH_CHECK(from < count() && to < count(), "marks ", from, " and ", to, " of ", count());
#ifdef TRAINER_CUDA
    if (!device.is_cpu()) {
      events[to].synchronize();
      return static_cast<double>(events[from].elapsed_time(events[to])) / 1e3;
    }
#endif
    return std::chrono::duration<double>(times[to] - times[from]).count();
  }

  // Called from a backward pass, where an exception would end the pass: a mark that fails is one that is not there.
  void note() noexcept {
    const auto index = watched.load(std::memory_order_relaxed);
    if (index < count()) {
      try {
        mark(index);
        noted.store(true, std::memory_order_relaxed);
      } catch (...) {
        noted.store(false, std::memory_order_relaxed);
      }
    }
  }

  const at::Device device;
  std::vector<std::chrono::steady_clock::time_point> times;
#ifdef TRAINER_CUDA
  std::vector<c10::cuda::CUDAEvent> events;
#endif
  std::atomic<size_t> watched{SIZE_MAX};
  std::atomic<bool> noted{false};
};

} // namespace

struct Clock {
  // Hooks of parameters may outlive the clock.
  std::shared_ptr<Marks> marks;
};

// Bytes that the allocator of a device has handed out, and has taken from it; the most at any time.
struct DeviceMemory {
  uint64_t allocated;
  uint64_t reserved;
  uint64_t total;
};

} // namespace trainer

using namespace trainer;

extern "C" {

int32_t trn_clock_new(int32_t device, size_t count, Clock** out) {
  return guarded([&] { *out = new Clock{std::make_shared<Marks>(device_of(device), count)}; });
}

int32_t trn_clock_free(Clock* clock) {
  return guarded([&] { delete clock; });
}

int32_t trn_clock_mark(Clock* clock, size_t index) {
  return guarded([&] { clock->marks->mark(index); });
}

// Waits until the device has passed the second mark.
int32_t trn_clock_seconds(const Clock* clock, size_t from, size_t to, double* out) {
  return guarded([&] { *out = clock->marks->seconds(from, to); });
}

// From here on a backward pass notes when gradients of these leaves arrive: see trn_clock_watch.
int32_t trn_clock_follow(Clock* clock, const at::Tensor* const* leaves, size_t count) {
  return guarded([&] {
    for (size_t i = 0; i < count; ++i) {
      leaves[i]->register_hook([marks = clock->marks](const at::Tensor&) { marks->note(); });
    }
  });
}

// The next gradients that arrive move the mark `index`; SIZE_MAX: none is moved.
int32_t trn_clock_watch(Clock* clock, size_t index) {
  return guarded([&] {
    clock->marks->noted.store(false, std::memory_order_relaxed);
    clock->marks->watched.store(index, std::memory_order_relaxed);
  });
}

// Whether a gradient has arrived since trn_clock_watch.
int32_t trn_clock_noted(const Clock* clock, int32_t* out) {
  return guarded([&] { *out = clock->marks->noted.load(std::memory_order_relaxed) ? 1 : 0; });
}

// On a GPU: whether it is an error if the host waits for it in an operation of LibTorch. Waits for events are none.
int32_t trn_forbid_waits(int32_t on) {
  return guarded([&] {
#ifdef TRAINER_CUDA
    using Mode = c10::cuda::SyncDebugMode;
    c10::cuda::warning_state().set_sync_debug_mode(on != 0 ? Mode::L_ERROR : Mode::L_DISABLED);
#else
    (void)on;
#endif
  });
}

// Of a GPU. Without CUDA an error.
int32_t trn_device_memory(int32_t index, DeviceMemory* out) {
  return guarded([&] {
#ifdef TRAINER_CUDA
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    const auto device = static_cast<c10::DeviceIndex>(index);
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device);
    cudaDeviceProp properties{};
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
    out->allocated = static_cast<uint64_t>(stats.allocated_bytes[all].peak);
    out->reserved = static_cast<uint64_t>(stats.reserved_bytes[all].peak);
    out->total = properties.totalGlobalMem;
#else
    (void)index, (void)out;
    TORCH_CHECK(false, "built without CUDA");
#endif
  });
}

// The name of a GPU, and its compute capability as major * 10 + minor; `room`: bytes of `name`, the last one is NUL.
int32_t trn_device_name(int32_t index, char* name, size_t room, int32_t* capability) {
  return guarded([&] {
#ifdef TRAINER_CUDA
    cudaDeviceProp properties{};
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
    std::strncpy(name, properties.name, room - 1);
    name[room - 1] = '\0';
    *capability = properties.major * 10 + properties.minor;
#else
    (void)index, (void)name, (void)room, (void)capability;
    TORCH_CHECK(false, "built without CUDA");
#endif
  });
}

} // extern "C"
