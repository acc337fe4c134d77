// The C ABI between the Rust face (ffi.rs) and LibTorch.
//
// Rules: every function returns a Status and stores the reason of a failure for trn_last_error (one text a thread); no
// C++ exception leaves a function. Tensors cross as `at::Tensor*`, which is what a `tch::Tensor` holds; the shim borrows
// them, and takes a reference of its own where it keeps one. A device is an int: -1 the CPU, else a CUDA index.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace trainer {

enum Status : int32_t {
  kOk = 0,
  // LibTorch refused: a shape, a type, a state.
  kFailed = 1,
  // A peer, the network or a time limit.
  kPeer = 2,
  // Memory ran out, on the host or on the device.
  kMemory = 3,
};

// The status of an exception without its own class.
enum class Touches {
  // A fault of the caller.
  kLocal,
  // A c10::Error is a fault of the caller; a plain std::exception comes from Gloo, so from the network.
  kNetwork,
  // The network, whatever was thrown: forming a group wraps Gloo's message in a c10::Error.
  kOnlyNetwork,
};

void remember(const char* message) noexcept;

// See defaults.cpp.
bool defaults_are_set() noexcept;

template <class Body>
int32_t guarded(Touches touches, Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
    return kOk;
  } catch (const c10::OutOfMemoryError& error) {
    remember(error.what_without_backtrace());
    return kMemory;
  } catch (const c10::DistError& error) {
    remember(error.what_without_backtrace());
    return kPeer;
  } catch (const c10::Error& error) {
    remember(error.what_without_backtrace());
    return touches == Touches::kOnlyNetwork ? kPeer : kFailed;
  } catch (const std::bad_alloc& error) {
    remember(error.what());
    return kMemory;
  } catch (const std::exception& error) {
    remember(error.what());
    return touches == Touches::kLocal ? kFailed : kPeer;
  } catch (...) {
    remember("an exception of unknown type");
    return kFailed;
  }
}

template <class Body>
int32_t guarded(Body&& body) noexcept {
  return guarded(Touches::kLocal, std::forward<Body>(body));
}

inline std::vector<at::Tensor> list(const at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> result;
  result.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    result.push_back(*tensors[i]);
  }
  return result;
}

inline at::Device device_of(int32_t index) {
  return index < 0 ? at::Device(at::kCPU) : at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index));
}

} // namespace trainer
