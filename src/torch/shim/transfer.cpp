// Small tensors to a GPU and numbers back, without a host that waits.
#include "shim.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#ifdef TRAINER_CUDA
#include <c10/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

namespace trainer {

// The values of a few tensors of one element each, on their way to the host.
struct Readback {
  Readback(at::Device where, size_t count) : device(where) {
    auto options = at::TensorOptions().dtype(at::kDouble);
#ifdef TRAINER_CUDA
    if (device.is_cuda()) {
      options = options.pinned_memory(true);
    }
#endif
    host = at::zeros({static_cast<int64_t>(count)}, options);
  }

  at::Device device;
  // fp64, so that no type of number is rounded.
  at::Tensor host;
#ifdef TRAINER_CUDA
  // Blocking, not spinning: the host leaves its core to others.
  c10::cuda::CUDAEvent arrived{cudaEventDisableTiming | cudaEventBlockingSync};
#endif
};

} // namespace trainer

using namespace trainer;

extern "C" {

int32_t trn_readback_new(int32_t device, size_t count, Readback** out) {
  return guarded([&] { *out = new Readback(device_of(device), count); });
}

int32_t trn_readback_free(Readback* readback) {
  return guarded([&] { delete readback; });
}

// The values that the tensors have at this point of the compute stream.
int32_t trn_readback_start(Readback* readback, const at::Tensor* const* scalars, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    TORCH_CHECK(static_cast<int64_t>(count) == readback->host.numel(), "another number of values than was said");
    auto* values = readback->host.mutable_data_ptr<double>();
    for (size_t i = 0; i < count; ++i) {
      TORCH_CHECK(
          scalars[i]->defined() && scalars[i]->numel() == 1 && scalars[i]->device() == readback->device,
          "value ", i, " is not one number on the device");
    }
    if (readback->device.is_cpu()) {
      for (size_t i = 0; i < count; ++i) {
        values[i] = scalars[i]->item<double>();
      }
      return;
    }
#ifdef TRAINER_CUDA
    std::vector<at::Tensor> wide;
    wide.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      wide.push_back(scalars[i]->detach().reshape({}).to(at::kDouble));
    }
    readback->host.copy_(at::stack(wide), /*non_blocking=*/true);
    readback->arrived.record(c10::cuda::getCurrentCUDAStream(readback->device.index()));
#endif
  });
}

// Waits until they have arrived. `count` is the number that was said.
int32_t trn_readback_wait(const Readback* readback, double* out, size_t count) {
  return guarded([&] {
    TORCH_CHECK(static_cast<int64_t>(count) == readback->host.numel(), "another number of values than was said");
#ifdef TRAINER_CUDA
    if (readback->device.is_cuda()) {
      readback->arrived.synchronize();
    }
#endif
    const auto* values = readback->host.const_data_ptr<double>();
    std::copy(values, values + count, out);
  });
}

// A tensor of the host, in memory from which a GPU reads by itself.
int32_t trn_pinned(const at::Tensor* tensor, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    *out = new at::Tensor(tensor->pin_memory());
  });
}

// A copy on the device: ordered before all later work of the current stream. Out of pinned memory the host does not
// wait, and the memory may be given up at once: its allocator waits for the copy before it is used again.
int32_t trn_upload(const at::Tensor* tensor, int32_t device, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    *out = new at::Tensor(tensor->to(device_of(device), tensor->scalar_type(), /*non_blocking=*/true));
  });
}

} // extern "C"
