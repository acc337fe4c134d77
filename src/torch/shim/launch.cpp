// See launch.h. The driver's library is opened when kernels are first loaded: a program that computes on a CPU, and a
// machine without a driver, do not need it.
#include "launch.h"

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include <c10/util/Exception.h>

#include "gpu_args.h"
#include "shim.h"

#ifdef TRAINER_CUDA
#include <dlfcn.h>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

namespace trainer {
namespace {

// Whether this thread computes what is on the CPU by the kernels for GPUs.
thread_local bool emulating = false;
// Which kernels this thread has emulated, by their numbers.
thread_local std::array<bool, kKernelCount * kForms> emulated{};

#ifdef TRAINER_CUDA

// The functions of the driver that are needed: opaque handles are pointers, results are numbers, 0 is success.
struct Driver {
  using Result = int;
  using Handle = void*;

  Result (*get_version)(int*);
  Result (*get_error)(Result, const char**);
  Result (*get_context)(Handle*);
  Result (*load_module)(Handle*, const void*);
  Result (*get_function)(Handle*, Handle, const char*);
  Result (*launch)(
      Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
      unsigned block_z, unsigned shared_bytes, Handle stream, void** args, void** extra);

  void check(Result result, const char* doing) const {
    if (result != 0) {
      const char* text = nullptr;
      get_error(result, &text);
      TORCH_CHECK(false, doing, ": ", text == nullptr ? "unknown error" : text, " (", result, ")");
    }
  }
};

const Driver& driver() {
  static const Driver functions = [] {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    TORCH_CHECK(library != nullptr, "open the driver: ", dlerror());
    const auto find = [&](const char* name) {
      void* found = dlsym(library, name);
      TORCH_CHECK(found != nullptr, "the driver has no ", name);
      return found;
    };
    Driver driver{};
    driver.get_version = reinterpret_cast<decltype(driver.get_version)>(find("cuDriverGetVersion"));
    driver.get_error = reinterpret_cast<decltype(driver.get_error)>(find("cuGetErrorString"));
    driver.get_context = reinterpret_cast<decltype(driver.get_context)>(find("cuCtxGetCurrent"));
    driver.load_module = reinterpret_cast<decltype(driver.load_module)>(find("cuModuleLoadData"));
    driver.get_function = reinterpret_cast<decltype(driver.get_function)>(find("cuModuleGetFunction"));
    driver.launch = reinterpret_cast<decltype(driver.launch)>(find("cuLaunchKernel"));
    return driver;
  }();
  return functions;
}

// Makes the runtime's context of the current device current for the driver: a new thread has none before its first
// call of the runtime.
void need_context() {
  void* context = nullptr;
  driver().check(driver().get_context(&context), "find the GPU's context");
  if (context == nullptr) {
    C10_CUDA_CHECK(cudaFree(nullptr));
  }
}

using Functions = std::array<void*, kKernelCount * kForms>;

// The kernels of each device, once they are loaded; they stay for the life of the process.
std::array<std::atomic<const Functions*>, 64> loaded{};

const Functions* kernels_on(at::Device device) {
  const auto index = static_cast<size_t>(device.index());
  return index < loaded.size() ? loaded[index].load(std::memory_order_acquire) : nullptr;
}

#endif

// The type's first form, and the bytes of an element.
size_t form_of(Type type) {
  return type == Type::kFloat ? 0 : 2;
}

int64_t bytes_of(Type type) {
  return type == Type::kFloat ? 4 : 2;
}

// Whether all of these can be read 16 bytes at a time.
class Wideness {
 public:
  explicit Wideness(Type type) : bytes_(bytes_of(type)) {}

  // Rows, or heads: where the first begins, and the elements from one to the next.
  template <class... Strides>
  Wideness& of(const void* first, Strides... strides) {
    return look(first, bytes_, strides...);
  }

  // The same of fp32.
  template <class... Strides>
  Wideness& of_floats(const float* first, Strides... strides) {
    return look(first, 4, strides...);
  }

  Wideness& extent(int64_t elements) {
    wide_ = wide_ && elements * bytes_ % 16 == 0;
    return *this;
  }

  // What to add to a type's first form.
  size_t form() const {
    return wide_ ? 1 : 0;
  }

 private:
  template <class... Strides>
  Wideness& look(const void* first, [[maybe_unused]] int64_t bytes, Strides... strides) {
    wide_ = wide_ && reinterpret_cast<uintptr_t>(first) % 16 == 0 && ((strides * bytes % 16 == 0) && ... && true);
    return *this;
  }

  int64_t bytes_;
  bool wide_ = true;
};

void check_extents(int64_t count, int64_t width) {
  // Places within a row are 32-bit numbers, and so are blocks.
  TORCH_CHECK(
      count >= 0 && count < INT32_MAX && width >= 0 && width < (int64_t{1} << 30), "no kernel takes ", count,
      " rows of ", width);
}

// `args`: the kernel's own structure.
template <class Args>
void launch(at::Device device, GpuKernel kernel, size_t form, int64_t across, int64_t down, const Args& args) {
  static_assert(sizeof(Args) <= 4096, "more than a kernel takes");
  const size_t number = static_cast<size_t>(kernel) * kForms + form;
  TORCH_INTERNAL_ASSERT(has_form(static_cast<size_t>(kernel), form) && across > 0 && down > 0 && down <= 65535);
  if (device.is_cpu()) {
#ifdef TRAINER_EMULATED
    emulated[number] = true;
    return emulate(number, static_cast<uint32_t>(across), static_cast<uint32_t>(down), &args);
#else
    TORCH_CHECK(false, "a CPU has no kernels of a GPU");
#endif
  }
#ifdef TRAINER_CUDA
  const auto* functions = kernels_on(device);
  TORCH_CHECK(functions != nullptr, "there is no fused function for ", device);
  c10::cuda::CUDAGuard guard(device);
  need_context();
  void* pointers[] = {const_cast<Args*>(&args)};
  driver().check(
      driver().launch(
          (*functions)[number], static_cast<unsigned>(across), static_cast<unsigned>(down), 1, TRAINER_THREADS, 1, 1,
          /*shared_bytes=*/0, c10::cuda::getCurrentCUDAStream(device.index()).stream(), pointers, nullptr),
      kKernelNames[static_cast<size_t>(kernel)]);
#else
  (void)number, (void)args;
  TORCH_CHECK(false, "built without CUDA");
#endif
}

} // namespace

bool is_for_gpu(const at::Tensor& tensor) {
  return tensor.is_cuda() || (emulating && tensor.device().is_cpu());
}

namespace gpu {

void rms_norm(
    at::Device device, Type type, Rows x, const float* weight, float eps, Rows y, float* scales, int64_t count,
    int64_t width) {
  check_extents(count, width);
  if (count == 0 || width == 0) {
    return;
  }
  Wideness wide(type);
  wide.of(x.first, x.stride).of(y.first, y.stride).of_floats(weight).extent(width);
  const RmsNormArgs args{x.first, x.stride, weight, y.first, y.stride, scales, width, eps};
  launch(device, GpuKernel::kRmsNorm, form_of(type) + wide.form(), count, 1, args);
}

void rms_norm_backward(
    at::Device device, Type type, Rows x, const float* weight, const float* scales, Rows dy, Rows dx, int64_t count,
    int64_t width) {
  check_extents(count, width);
  if (count == 0 || width == 0) {
    return;
  }
  Wideness wide(type);
  wide.of(x.first, x.stride).of(dy.first, dy.stride).of(dx.first, dx.stride).of_floats(weight).extent(width);
  const RmsNormBackwardArgs args{x.first, x.stride, weight, scales, dy.first, dy.stride, dx.first, dx.stride, width};
  launch(device, GpuKernel::kRmsNormBackward, form_of(type) + wide.form(), count, 1, args);
}

void rms_norm_weight(
    at::Device device, Type type, Rows x, const float* scales, Rows dy, float* parts, int64_t split, float* total,
    int64_t count, int64_t width) {
  check_extents(count, width);
  if (width == 0 || split == 0) {
    return;
  }
  const RmsNormWeightArgs args{x.first, x.stride, scales, dy.first, dy.stride, parts, count, width};
  const auto columns = (width + TRAINER_COLUMNS - 1) / TRAINER_COLUMNS;
  launch(device, GpuKernel::kRmsNormWeight, form_of(type), columns, split, args);
  const AddUpArgs sum{parts, split, width, total};
  launch(device, GpuKernel::kAddUp, 0, (width + TRAINER_THREADS - 1) / TRAINER_THREADS, 1, sum);
}

void rotate(
    at::Device device, Type type, Heads x, Turns turns, Heads y, RotaryExtents extents, bool inverse, int64_t count) {
  check_extents(count, extents.heads * extents.head);
  if (count == 0 || extents.heads * extents.head == 0) {
    return;
  }
  Wideness wide(type);
  wide.of(x.first, x.batch, x.token, x.head).of(y.first, y.batch, y.token, y.head).extent(extents.width / 2);
  wide.of_floats(turns.cos, turns.batch, turns.token).of_floats(turns.sin, turns.batch, turns.token);
  const RotateArgs args{
      x.first,        x.batch,         x.token, x.head,  turns.cos, turns.sin,      turns.batch,
      turns.token,    y.first,         y.batch, y.token, y.head,    extents.tokens, extents.heads,
      extents.head,   extents.width,   inverse ? 1 : 0};
  launch(device, GpuKernel::kRotate, form_of(type) + wide.form(), count, 1, args);
}

void gate(at::Device device, Type type, Activation act, Rows gate, Rows up, Rows y, int64_t count, int64_t width) {
  check_extents(count, width);
  if (count == 0 || width == 0) {
    return;
  }
  Wideness wide(type);
  wide.of(gate.first, gate.stride).of(up.first, up.stride).of(y.first, y.stride).extent(width);
  const GateArgs args{gate.first, gate.stride, up.first, up.stride, y.first, y.stride, width};
  const auto kernel = act == Activation::kSilu ? GpuKernel::kSilu : GpuKernel::kGelu;
  launch(device, kernel, form_of(type) + wide.form(), count, 1, args);
}

void gate_backward(
    at::Device device, Type type, Activation act, Rows gate, Rows up, Rows dy, Rows dgate, Rows dup, int64_t count,
    int64_t width) {
  check_extents(count, width);
  if (count == 0 || width == 0) {
    return;
  }
  Wideness wide(type);
  wide.of(gate.first, gate.stride).of(up.first, up.stride).of(dy.first, dy.stride).extent(width);
  wide.of(dgate.first, dgate.stride).of(dup.first, dup.stride);
  const GateBackwardArgs args{
      gate.first,  gate.stride,  up.first,  up.stride,  dy.first, dy.stride,
      dgate.first, dgate.stride, dup.first, dup.stride, width};
  const auto kernel = act == Activation::kSilu ? GpuKernel::kSiluBackward : GpuKernel::kGeluBackward;
  launch(device, kernel, form_of(type) + wide.form(), count, 1, args);
}

void cross_entropy(
    at::Device device, Type type, Rows scores, const int64_t* targets, float* losses, bool gradient, int64_t count,
    int64_t width) {
  check_extents(count, width);
  if (count == 0 || width == 0) {
    return;
  }
  Wideness wide(type);
  wide.of(scores.first, scores.stride).extent(width);
  static_assert(sizeof(trainer_i64) == sizeof(int64_t));
  const CrossEntropyArgs args{
      scores.first, scores.stride, reinterpret_cast<const trainer_i64*>(targets), losses, gradient ? 1 : 0, width};
  launch(device, GpuKernel::kCrossEntropy, form_of(type) + wide.form(), count, 1, args);
}

} // namespace gpu
} // namespace trainer

using namespace trainer;

extern "C" {

// The version of the driver, as it counts them: 13000 for CUDA 13.0.
int32_t trn_gpu_driver(int32_t* version) {
  return guarded([&] {
#ifdef TRAINER_CUDA
    int found = 0;
    driver().check(driver().get_version(&found), "ask the driver for its version");
    *version = found;
#else
    (void)version;
    TORCH_CHECK(false, "built without CUDA");
#endif
  });
}

// Loads the kernels of gpu.cu, compiled, for a device. They stay. Loading them a second time changes nothing.
int32_t trn_gpu_load(int32_t index, const void* image) {
  return guarded([&] {
#ifdef TRAINER_CUDA
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const auto device = device_of(index);
    TORCH_CHECK(index >= 0 && static_cast<size_t>(index) < loaded.size(), "device ", index, " has no place");
    if (kernels_on(device) != nullptr) {
      return;
    }
    c10::cuda::CUDAGuard guard(device);
    need_context();
    void* module = nullptr;
    driver().check(driver().load_module(&module, image), "load the kernels");
    auto functions = std::make_unique<Functions>();
    for (size_t kernel = 0; kernel < kKernelCount; ++kernel) {
      for (size_t form = 0; form < kForms; ++form) {
        if (has_form(kernel, form)) {
          const auto name = std::string(kKernelNames[kernel]) + kFormNames[form];
          auto& function = (*functions)[kernel * kForms + form];
          driver().check(driver().get_function(&function, module, name.c_str()), name.c_str());
        }
      }
    }
    loaded[static_cast<size_t>(index)].store(functions.release(), std::memory_order_release);
#else
    (void)index, (void)image;
    TORCH_CHECK(false, "built without CUDA");
#endif
  });
}

// From here on this thread computes tensors of the CPU by the kernels for GPUs, or no longer. An error in a program
// that is made without them.
int32_t trn_gpu_emulate(int32_t on) {
  return guarded([&] {
#ifdef TRAINER_EMULATED
    emulating = on != 0;
#else
    (void)on;
    TORCH_CHECK(false, "this program does not emulate GPUs");
#endif
  });
}

// How many forms of kernels there are, and how many of them this thread has emulated.
int32_t trn_gpu_emulated(uint64_t* all, uint64_t* done) {
  return guarded([&] {
    *all = 0, *done = 0;
    for (size_t number = 0; number < emulated.size(); ++number) {
      *all += has_form(number / kForms, number % kForms) ? 1 : 0;
      *done += emulated[number] ? 1 : 0;
    }
  });
}

} // extern "C"
