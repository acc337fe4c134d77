// CUDA: devices, pinned memory, and copies to the host on a separate stream. Without CUDA the functions return an
// error.
#include "shim.h"

#ifdef TRAINER_CUDA
#include <memory>

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

// A point in the compute stream's work.
struct Mark {
#ifdef TRAINER_CUDA
  explicit Mark(at::DeviceIndex index) : device(index), event(cudaEventDisableTiming) {}
  at::DeviceIndex device;
  c10::cuda::CUDAEvent event;
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
#ifdef TRAINER_CUDA
    auto mark = std::make_unique<Mark>(static_cast<at::DeviceIndex>(index));
    mark->event.record(c10::cuda::getCurrentCUDAStream(mark->device));
    *out = mark.release();
#else
    (void)index, (void)out;
    TORCH_CHECK(false, "built without CUDA");
#endif
  });
}

int32_t trn_mark_free(Mark* mark) {
  return guarded([&] { delete mark; });
}

// Copies to the host the content that the sources had at the mark, and returns when the bytes have arrived.
int32_t trn_copy_after(Mark* mark, const Run* runs, size_t count) {
  return guarded([&] {
#ifdef TRAINER_CUDA
    c10::cuda::CUDAGuard guard(mark->device);
    auto stream = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, mark->device);
    mark->event.block(stream);
    for (size_t i = 0; i < count; ++i) {
      C10_CUDA_CHECK(cudaMemcpyAsync(
          runs[i].target, runs[i].source, runs[i].bytes, cudaMemcpyDeviceToHost, stream.stream()));
    }
    // Blocking, not spinning: the thread leaves its core to computing threads.
    c10::cuda::CUDAEvent done(cudaEventDisableTiming | cudaEventBlockingSync);
    done.record(stream);
    done.synchronize();
#else
    (void)mark, (void)runs, (void)count;
    TORCH_CHECK(false, "built without CUDA");
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
