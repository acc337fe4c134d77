// Optimizer, norms, random numbers, settings, and raw bytes of tensors.
#include "shim.h"

#include <mutex>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/SDPBackend.h>
#include <ATen/core/grad_mode.h>

namespace trainer {
namespace {

thread_local std::string last_error;

at::Generator generator_of(at::Device device) {
  return device.is_cpu() ? at::detail::getDefaultCPUGenerator() : at::globalContext().defaultGenerator(device);
}

void check_plain(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined(), "the tensor is undefined");
  TORCH_CHECK(tensor.layout() == at::kStrided && !tensor.is_quantized(), "the tensor is not a plain dense one");
  TORCH_CHECK(tensor.device().is_cpu() || tensor.device().is_cuda(), "the tensor is neither on the CPU nor on a GPU");
}

// The tensor's own memory as bytes; writing to it counts as a change of the tensor.
at::Tensor as_bytes(const at::Tensor& tensor) {
  check_plain(tensor);
  TORCH_CHECK(tensor.is_contiguous(), "the tensor is not contiguous");
  return tensor.detach().view({-1}).view(at::kByte);
}

} // namespace

void remember(const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
}

// What a Rust caller must know before it touches a tensor's memory.
struct TensorFacts {
  const void* data;
  uint64_t bytes;
  int32_t device;
  int32_t contiguous;
};

} // namespace trainer

using namespace trainer;

extern "C" {

const char* trn_last_error() {
  return defaults_are_set() ? last_error.c_str() : "";
}

int32_t trn_tensor_facts(const at::Tensor* tensor, TensorFacts* out) {
  return guarded([&] {
    check_plain(*tensor);
    out->bytes = static_cast<uint64_t>(tensor->numel()) * tensor->element_size();
    out->device = tensor->device().is_cpu() ? -1 : static_cast<int32_t>(tensor->device().index());
    out->contiguous = tensor->is_contiguous() ? 1 : 0;
    out->data = out->bytes == 0 ? nullptr : tensor->const_data_ptr();
  });
}

// The caller has compared `bytes` with the tensor's size.
int32_t trn_tensor_load(const at::Tensor* tensor, const void* source, uint64_t bytes) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto target = as_bytes(*tensor);
    // from_blob wants a mutable pointer; copy_ only reads from it.
    target.copy_(at::from_blob(const_cast<void*>(source), {static_cast<int64_t>(bytes)}, at::kByte));
  });
}

int32_t trn_tensor_store(const at::Tensor* tensor, void* target, uint64_t bytes) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::from_blob(target, {static_cast<int64_t>(bytes)}, at::kByte).copy_(as_bytes(*tensor));
  });
}

int32_t trn_adamw_step(
    size_t count,
    const at::Tensor* const* params,
    const at::Tensor* const* grads,
    const at::Tensor* const* exp_avgs,
    const at::Tensor* const* exp_avg_sqs,
    uint64_t step,
    double lr,
    double beta1,
    double beta2,
    double eps,
    double weight_decay,
    const at::Tensor* grad_scale) {
  return guarded([&] {
    if (count == 0) {
      return;
    }
    at::NoGradGuard no_grad;
    const auto device = params[0]->device();
    // The kernels walk over raw memory and trust their arguments.
    for (size_t i = 0; i < count; ++i) {
      for (const auto* tensor : {params[i], grads[i], exp_avgs[i], exp_avg_sqs[i]}) {
        TORCH_CHECK(tensor->defined(), "tensor ", i, " of the optimizer step is undefined");
        TORCH_CHECK(
            tensor->is_contiguous() && tensor->sizes() == params[i]->sizes() &&
                tensor->scalar_type() == params[i]->scalar_type() && tensor->device() == device,
            "tensor ", i, " of the optimizer step has other extents, type or device than its parameter (",
            tensor->sizes(), " against ", params[i]->sizes(), "), or is not contiguous");
      }
    }
    std::optional<at::Tensor> scale, found_inf;
    if (grad_scale != nullptr) {
      TORCH_CHECK(
          grad_scale->numel() == 1 && grad_scale->scalar_type() == at::kFloat && grad_scale->device() == device,
          "the gradient scale must be one 32-bit float on the parameters' device");
      scale = *grad_scale;
      // The kernels leave everything as it is where this is one.
      found_inf = at::ne(*grad_scale, *grad_scale).to(at::kFloat);
    }
    const auto steps = at::full({}, static_cast<double>(step), at::TensorOptions().dtype(at::kFloat).device(device));
    at::_fused_adamw_(
        list(params, count),
        list(grads, count),
        list(exp_avgs, count),
        list(exp_avg_sqs, count),
        /*max_exp_avg_sqs=*/{},
        std::vector<at::Tensor>(count, steps),
        lr,
        beta1,
        beta2,
        weight_decay,
        eps,
        /*amsgrad=*/false,
        /*maximize=*/false,
        scale,
        found_inf);
  });
}

int32_t trn_norm(const at::Tensor* const* tensors, size_t count, at::Tensor** out) {
  return guarded([&] {
    TORCH_CHECK(count > 0, "the norm of no tensors");
    at::NoGradGuard no_grad;
    *out = new at::Tensor(at::linalg_vector_norm(at::stack(at::_foreach_norm(list(tensors, count), 2)), 2));
  });
}

// In place, so that gradients stay where the reducer's buckets are.
int32_t trn_zero_gradients(const at::Tensor* const* params, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> present;
    present.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      auto& grad = params[i]->mutable_grad();
      if (grad.defined()) {
        present.push_back(grad);
      } else {
        grad = at::zeros_like(*params[i], at::MemoryFormat::Contiguous);
      }
    }
    if (!present.empty()) {
      at::_foreach_zero_(present);
    }
  });
}

int32_t trn_gradient(const at::Tensor* param, at::Tensor** out) {
  return guarded([&] {
    TORCH_CHECK(param->grad().defined(), "the parameter has no gradient");
    *out = new at::Tensor(param->grad());
  });
}

int32_t trn_set_num_threads(int32_t threads) {
  return guarded([&] { at::set_num_threads(threads); });
}

int32_t trn_set_interop_threads(int32_t threads) {
  return guarded([&] { at::set_num_interop_threads(threads); });
}

int32_t trn_set_deterministic(int32_t on) {
  return guarded([&] {
    auto& context = at::globalContext();
    context.setDeterministicAlgorithms(on != 0, /*warn_only=*/false);
    context.setDeterministicCuDNN(on != 0);
    context.setBenchmarkCuDNN(false);
    // It would fill every fresh tensor with NaN: a pass over memory that finds bugs and changes no correct result.
    context.setDeterministicFillUninitializedMemory(false);
    if (on == 0) {
      // cuDNN's attention is the fastest of those that a GPU has; its backward pass has no fixed order of additions.
      using Backend = at::SDPBackend;
      std::vector<int64_t> order;
      for (const auto backend :
           {Backend::cudnn_attention, Backend::flash_attention, Backend::efficient_attention, Backend::math}) {
        order.push_back(static_cast<int64_t>(backend));
      }
      context.setSDPPriorityOrder(order);
    }
  });
}

int32_t trn_manual_seed(uint64_t seed) {
  return guarded([&] { at::manual_seed(seed); });
}

int32_t trn_rng_state(int32_t device, at::Tensor** out) {
  return guarded([&] {
    auto generator = generator_of(device_of(device));
    std::lock_guard<std::mutex> lock(generator.mutex());
    *out = new at::Tensor(generator.get_state());
  });
}

int32_t trn_set_rng_state(int32_t device, const at::Tensor* state) {
  return guarded([&] {
    auto generator = generator_of(device_of(device));
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(*state);
  });
}

} // extern "C"
