// LibTorch's binary carries Gloo, but its wheel ships no Gloo header. ProcessGroupGloo.hpp holds pointers to Gloo's
// types only, so declarations are enough: no layout is assumed, and every function named here is one that
// libtorch_cpu.so exports.
#pragma once

#include <chrono>

#include <gloo/transport/device.h>

namespace gloo {

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};

} // namespace gloo
