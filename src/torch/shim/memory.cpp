// Counts the bytes of tensors in the host's memory, for measurements: a process that does not ask for it is not
// affected.
#include "shim.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

namespace trainer {
namespace {

// LibTorch's allocator, and a list of what it has handed out since the count began.
class Counting final : public at::Allocator {
 public:
  // Lives as long as the process: blocks of any thread are freed through it.
  static Counting& get() {
    static auto* one = new Counting(*c10::GetCPUAllocator());
    return *one;
  }

  at::DataPtr allocate(size_t bytes) override {
    auto made = inner_.allocate(bytes);
    if (bytes == 0 || made.get() == nullptr) {
      return made;
    }
    TORCH_CHECK(made.get() == made.get_context(), "the host's allocator hands out blocks that it keeps books of");
    auto* const block = made.get();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      sizes_.emplace(block, bytes);
      now_ += bytes;
      peak_ = std::max(peak_, now_);
    }
    const auto device = made.device();
    made.release_context();
    return {block, block, &release, device};
  }

  at::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  void read(uint64_t* now, uint64_t* peak, bool again) {
    const std::lock_guard<std::mutex> lock(mutex_);
    *now = now_;
    *peak = peak_;
    if (again) {
      peak_ = now_;
    }
  }

 private:
  explicit Counting(at::Allocator& inner) : inner_(inner) {}

  // A block that is older than the count is in no list.
  static void release(void* block) {
    auto& self = get();
    {
      const std::lock_guard<std::mutex> lock(self.mutex_);
      const auto found = self.sizes_.find(block);
      if (found != self.sizes_.end()) {
        self.now_ -= found->second;
        self.sizes_.erase(found);
      }
    }
    self.inner_.raw_deallocate(block);
  }

  at::Allocator& inner_;
  std::mutex mutex_;
  std::unordered_map<void*, uint64_t> sizes_;
  uint64_t now_ = 0;
  uint64_t peak_ = 0;
};

} // namespace
} // namespace trainer

using namespace trainer;

extern "C" {

// From here on tensors in the host's memory are counted. Call it once, before there are threads that make tensors.
int32_t trn_count_memory() {
  return guarded([&] { c10::SetCPUAllocator(&Counting::get(), /*priority=*/100); });
}

// Bytes of counted tensors, and the most since the count began or since it was last asked for `again`.
int32_t trn_counted_memory(uint64_t* now, uint64_t* peak, int32_t again) {
  return guarded([&] { Counting::get().read(now, peak, again != 0); });
}

} // extern "C"
