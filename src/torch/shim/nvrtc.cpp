// NVIDIA's run-time compiler: CUDA C++ to the code of one kind of GPU. Its library is opened when it is first wanted,
// and needs neither a GPU nor a driver.
#include <dlfcn.h>

#include <memory>
#include <string>

#include "shim.h"

namespace trainer {
namespace {

// The functions of NVRTC that are needed: results are numbers, 0 is success.
struct Nvrtc {
  using Result = int;
  using Program = void*;

  Result (*version)(int*, int*);
  const char* (*error)(Result);
  Result (*create)(Program*, const char*, const char*, int, const char* const*, const char* const*);
  Result (*destroy)(Program*);
  Result (*compile)(Program, int, const char* const*);
  Result (*log_size)(Program, size_t*);
  Result (*log)(Program, char*);
  Result (*cubin_size)(Program, size_t*);
  Result (*cubin)(Program, char*);

  void check(Result result, const char* doing) const {
    TORCH_CHECK(result == 0, doing, ": ", error(result));
  }
};

Nvrtc opened(const char* library) {
  // It stays open: its functions are used until the process ends.
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(handle != nullptr, "open NVRTC: ", dlerror());
  const auto find = [&](const char* name) {
    void* found = dlsym(handle, name);
    TORCH_CHECK(found != nullptr, library, " has no ", name);
    return found;
  };
  Nvrtc nvrtc{};
  nvrtc.version = reinterpret_cast<decltype(nvrtc.version)>(find("nvrtcVersion"));
  nvrtc.error = reinterpret_cast<decltype(nvrtc.error)>(find("nvrtcGetErrorString"));
  nvrtc.create = reinterpret_cast<decltype(nvrtc.create)>(find("nvrtcCreateProgram"));
  nvrtc.destroy = reinterpret_cast<decltype(nvrtc.destroy)>(find("nvrtcDestroyProgram"));
  nvrtc.compile = reinterpret_cast<decltype(nvrtc.compile)>(find("nvrtcCompileProgram"));
  nvrtc.log_size = reinterpret_cast<decltype(nvrtc.log_size)>(find("nvrtcGetProgramLogSize"));
  nvrtc.log = reinterpret_cast<decltype(nvrtc.log)>(find("nvrtcGetProgramLog"));
  nvrtc.cubin_size = reinterpret_cast<decltype(nvrtc.cubin_size)>(find("nvrtcGetCUBINSize"));
  nvrtc.cubin = reinterpret_cast<decltype(nvrtc.cubin)>(find("nvrtcGetCUBIN"));
  // Its second library lies beside it, where it does not look itself: it takes one that is loaded.
  int major = 0, minor = 0;
  Dl_info where{};
  if (nvrtc.version(&major, &minor) == 0 && dladdr(reinterpret_cast<void*>(nvrtc.version), &where) != 0) {
    const std::string path(where.dli_fname);
    const auto version = std::to_string(major) + "." + std::to_string(minor);
    const auto beside = path.substr(0, path.rfind('/') + 1) + "libnvrtc-builtins.so." + version;
    // If this fails, the compiler says what it lacks.
    dlopen(beside.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  return nvrtc;
}

// A program of NVRTC's, freed with this value.
struct Program {
  explicit Program(const Nvrtc& functions) : nvrtc(functions) {}
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program() {
    if (handle != nullptr) {
      nvrtc.destroy(&handle);
    }
  }

  std::string log() const {
    size_t size = 0;
    if (nvrtc.log_size(handle, &size) != 0 || size == 0) {
      return {};
    }
    std::string text(size, '\0');
    if (nvrtc.log(handle, text.data()) != 0) {
      return {};
    }
    // The size counts the NUL at its end.
    text.resize(size - 1);
    return text;
  }

  const Nvrtc& nvrtc;
  Nvrtc::Program handle = nullptr;
};

} // namespace

// The compiler.
struct Compiler {
  Nvrtc nvrtc;
};

// What it has made.
struct Compiled {
  std::string image;
  std::string log;
};

} // namespace trainer

using namespace trainer;

extern "C" {

// `library`: its file, or its name for the loader to find. The version is major · 1000 + minor.
int32_t trn_nvrtc_open(const char* library, int32_t* version, Compiler** out) {
  return guarded([&] {
    auto compiler = std::make_unique<Compiler>(Compiler{opened(library)});
    int major = 0, minor = 0;
    compiler->nvrtc.check(compiler->nvrtc.version(&major, &minor), "ask NVRTC for its version");
    *version = major * 1000 + minor;
    *out = compiler.release();
  });
}

int32_t trn_nvrtc_free(Compiler* compiler) {
  return guarded([&] { delete compiler; });
}

// Compiles `source` with these options.
int32_t trn_nvrtc_compile(
    const Compiler* compiler, const char* source, const char* const* options, int32_t count, Compiled** out) {
  return guarded([&] {
    const auto& nvrtc = compiler->nvrtc;
    Program program(nvrtc);
    nvrtc.check(nvrtc.create(&program.handle, source, "gpu.cu", 0, nullptr, nullptr), "begin to compile the kernels");
    const auto result = nvrtc.compile(program.handle, count, options);
    auto compiled = std::make_unique<Compiled>();
    compiled->log = program.log();
    TORCH_CHECK(result == 0, "compile the kernels: ", nvrtc.error(result), "\n", compiled->log);
    size_t size = 0;
    nvrtc.check(nvrtc.cubin_size(program.handle, &size), "take the compiled kernels");
    TORCH_CHECK(size > 0, "NVRTC made no code for this kind of GPU");
    compiled->image.resize(size);
    nvrtc.check(nvrtc.cubin(program.handle, compiled->image.data()), "take the compiled kernels");
    *out = compiled.release();
  });
}

// Valid as long as `compiled`.
int32_t trn_compiled_parts(
    const Compiled* compiled, const char** image, size_t* image_bytes, const char** log, size_t* log_bytes) {
  return guarded([&] {
    *image = compiled->image.data();
    *image_bytes = compiled->image.size();
    *log = compiled->log.data();
    *log_bytes = compiled->log.size();
  });
}

int32_t trn_compiled_free(Compiled* compiled) {
  return guarded([&] { delete compiled; });
}

} // extern "C"
