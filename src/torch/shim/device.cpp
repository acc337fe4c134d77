// CUDA: devices, pinned memory, and copies to the host on a separate stream. Without CUDA, functions that need a GPU
// return an error.
#include "shim.h"

#include <cstring>
#include <memory>

#ifdef TRAINER_CUDA
#include <c10/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

namespace trainer {

// One run of memory to copy.
struct Run {
  const void* source;
  void* target;
  uint64_t bytes;
};

// A point in the compute stream's work, and copies behind it. On a CPU (-1) all work before it is done, and so is a
// copy when the call that orders it returns.
struct Mark {
  explicit Mark(int32_t index) : device(static_cast<at::DeviceIndex>(index)) {}
  at::DeviceIndex device;
#ifdef TRAINER_CUDA
  c10::cuda::CUDAEvent event{cudaEventDisableTiming};
  // The copies are done. Blocking, not spinning: the thread that waits leaves its core to computing threads.
  c10::cuda::CUDAEvent done{cudaEventDisableTiming | cudaEventBlockingSync};
#endif
};

} // namespace trainer

using namespace trainer;

extern "C" {

// 0 without a driver or a device: that is not an error.
int32_t trn_device_count(int32_t* out) {
  return guarded([&] {
#ifdef TRAINER_CUDA
    *out = static_cast<int32_t>(c10::cuda::device_count());
#else
    *out = 0;
#endif
  });
}

int32_t trn_use_device(int32_t index) {
  return guarded([&] {
#ifdef TRAINER_CUDA
    c10::cuda::set_device(static_cast<at::DeviceIndex>(index));
#else
    (void)index;
    TORCH_CHECK(false, "built without CUDA");
#endif
  });
}

int32_t trn_mark(int32_t index, Mark** out) {
  return guarded([&] {
    auto mark = std::make_unique<Mark>(index);
    if (index >= 0) {
#ifdef TRAINER_CUDA
      mark->event.record(c10::cuda::getCurrentCUDAStream(mark->device));
#else
      TORCH_CHECK(false, "built without CUDA");
#endif
    }
    *out = mark.release();
  });
}

int32_t trn_mark_free(Mark* mark) {
  return guarded([&] { delete mark; });
}

// Orders copies to the host of the content that the sources had at the mark. Out of pinned memory it returns before
// they are made.
int32_t trn_copy_after(Mark* mark, const Run* runs, size_t count) {
  return guarded([&] {
    if (mark->device < 0) {
      for (size_t i = 0; i < count; ++i) {
        std::memcpy(runs[i].target, runs[i].source, runs[i].bytes);
      }
      return;
    }
#ifdef TRAINER_CUDA
    c10::cuda::CUDAGuard guard(mark->device);
    auto stream = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, mark->device);
    mark->event.block(stream);
    auto result = cudaSuccess;
    for (size_t i = 0; i < count && result == cudaSuccess; ++i) {
      result = cudaMemcpyAsync(
          runs[i].target, runs[i].source, runs[i].bytes, cudaMemcpyDeviceToHost, stream.stream());
    }
    // Behind the copies that were ordered before one failed, too: they write to memory that must stay.
    mark->done.record(stream);
    C10_CUDA_CHECK(result);
#endif
  });
}

// Returns when the bytes of trn_copy_after have arrived. It may run beside trn_copy_hold.
int32_t trn_copy_wait(const Mark* mark) {
  return guarded([&] {
#ifdef TRAINER_CUDA
    // An event that was never recorded is done.
    mark->done.synchronize();
#else
    (void)mark;
#endif
  });
}

// Whatever is launched on the device's current stream from here on runs when the bytes of trn_copy_after, which has
// returned, have arrived. The host does not wait.
int32_t trn_copy_hold(Mark* mark) {
  return guarded([&] {
#ifdef TRAINER_CUDA
    if (mark->device >= 0) {
      mark->done.block(c10::cuda::getCurrentCUDAStream(mark->device));
    }
#else
    (void)mark;
#endif
  });
}

int32_t trn_pin(void* memory, uint64_t bytes) {
  return guarded([&] {
#ifdef TRAINER_CUDA
    C10_CUDA_CHECK(cudaHostRegister(memory, bytes, cudaHostRegisterPortable));
#else
    (void)memory, (void)bytes;
#endif
  });
}

int32_t trn_unpin(void* memory) {
  return guarded([&] {
#ifdef TRAINER_CUDA
    C10_CUDA_CHECK(cudaHostUnregister(memory));
#else
    (void)memory;
#endif
  });
}

} // extern "C"
