// The fused functions of kernels.h as kernels of a GPU (gpu.cu): the same arguments, and all rows at once.
//
// A kernel is launched on the current stream of the device, and the host does not wait. Nothing is launched for no
// rows. A device has kernels once trn_gpu_load has succeeded for it; without them a launch is an error.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels.h"

namespace trainer {

// Whether the tensor is computed by kernels of a GPU: it lies on one, or this thread emulates one.
bool is_for_gpu(const at::Tensor& tensor);

namespace gpu {

// Parts into which rows are split to add up a weight's gradient: as many on every GPU, so that they have one order.
constexpr int64_t kParts = 64;

// `device`: where all the pointers lead to.
void rms_norm(
    at::Device device, Type type, Rows x, const float* weight, float eps, Rows y, float* scales, int64_t count,
    int64_t width);
// The gradient with respect to x.
void rms_norm_backward(
    at::Device device, Type type, Rows x, const float* weight, const float* scales, Rows dy, Rows dx, int64_t count,
    int64_t width);
// The gradient with respect to the weight: of each of `split` parts of the rows in `parts` `[split, width]`, of all in
// `total`.
void rms_norm_weight(
    at::Device device, Type type, Rows x, const float* scales, Rows dy, float* parts, int64_t split, float* total,
    int64_t count, int64_t width);
void rotate(
    at::Device device, Type type, Heads x, Turns turns, Heads y, RotaryExtents extents, bool inverse, int64_t count);
void gate(
    at::Device device, Type type, Activation act, Rows gate, Rows up, Rows y, int64_t count, int64_t width);
void gate_backward(
    at::Device device, Type type, Activation act, Rows gate, Rows up, Rows dy, Rows dgate, Rows dup, int64_t count,
    int64_t width);
// A target outside the row has a loss that is a NaN.
void cross_entropy(
    at::Device device, Type type, Rows scores, const int64_t* targets, float* losses, bool gradient, int64_t count,
    int64_t width);

} // namespace gpu

// The kernels of gpu.cu, in this order in every table of them.
constexpr const char* kKernelNames[] = {
    "rms_norm",      "rms_norm_backward", "rms_norm_weight", "add_up", "rotate", "silu",
    "silu_backward", "gelu",              "gelu_backward",   "cross_entropy"};
enum class GpuKernel : size_t {
  kRmsNorm,
  kRmsNormBackward,
  kRmsNormWeight,
  kAddUp,
  kRotate,
  kSilu,
  kSiluBackward,
  kGelu,
  kGeluBackward,
  kCrossEntropy,
};
constexpr size_t kKernelCount = sizeof(kKernelNames) / sizeof(kKernelNames[0]);
static_assert(static_cast<size_t>(GpuKernel::kCrossEntropy) + 1 == kKernelCount);

// The forms of a kernel, in this order in every table of them.
constexpr const char* kFormNames[] = {"_f32", "_f32_wide", "_bf16", "_bf16_wide"};
constexpr size_t kForms = sizeof(kFormNames) / sizeof(kFormNames[0]);

// Whether gpu.cu has this form of a kernel.
constexpr bool has_form(size_t kernel, size_t form) {
  const bool wide = form % 2 == 1;
  if (kernel == static_cast<size_t>(GpuKernel::kAddUp)) {
    return form == 0;
  }
  return !(wide && kernel == static_cast<size_t>(GpuKernel::kRmsNormWeight));
}

#ifdef TRAINER_EMULATED
// Runs a kernel's blocks one after the other on this thread. `number`: as in the tables, kernel · kForms + form.
void emulate(size_t number, uint32_t across, uint32_t down, const void* args);
#endif

} // namespace trainer
