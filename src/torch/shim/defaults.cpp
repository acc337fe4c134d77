// Defaults of LibTorch that only its environment variables can set. A variable that is already set wins.
//
// They are set before main, while there is one thread: setenv beside a reader in another thread is a crash.
#include "shim.h"

#include <cstdlib>

#include <c10/util/Logging.h>

namespace trainer {
namespace {

const bool defaults_set = [] {
  const auto set = [](const char* name, const char* value) { setenv(name, value, /*overwrite=*/0); };
  // c10d logs each failed attempt to connect with a backtrace, beside the error that it throws. The error is enough.
  set("TORCH_CPP_LOG_LEVEL", "FATAL");
  c10::initLogging();
  // The flight recorder notes every collective for a reader that we do not have. It changes a map of the whole process
  // without its lock (2.11.0): two groups on two threads crash.
  set("TORCH_FR_BUFFER_SIZE", "0");
  // cuBLAS is deterministic only with a workspace of fixed size.
  set("CUBLAS_WORKSPACE_CONFIG", ":4096:8");
#ifdef TRAINER_CUDA
  // Batches of several sizes leave holes in segments of a fixed size. Where a driver can't grow segments, LibTorch does
  // without.
  if (getenv("PYTORCH_CUDA_ALLOC_CONF") == nullptr) {
    set("PYTORCH_ALLOC_CONF", "expandable_segments:True");
  }
  // A collective that fails or exceeds its limit ends the process at once, without tidying up: its agent starts the
  // group again. (3: SkipCleanUp.)
  set("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3");
  // A watchdog that hangs in a call of CUDA or NCCL ends the process, too; the default is eight minutes.
  set("TORCH_NCCL_ENABLE_MONITORING", "1");
  set("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "120");
  // There is no flight recorder (see above) whose notes an end would have to wait for.
  set("TORCH_NCCL_DUMP_ON_TIMEOUT", "0");
  // Sums within NVLink's switches have no order that is promised; rings and trees of one machine type have.
  set("NCCL_NVLS_ENABLE", "0");
#endif
  return true;
}();

} // namespace

// Named by trn_last_error, so that the linker keeps this file.
bool defaults_are_set() noexcept {
  return defaults_set;
}

} // namespace trainer
