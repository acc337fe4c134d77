// Sums over the bits of tensors on the CPU, in one pass over them, on one thread. Integer arithmetic modulo 2^64: every
// machine gives the same.
#include "shim.h"

#include <algorithm>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace trainer {
namespace {

template <class Word>
void sum_rows(const Word* words, int64_t count, const int64_t* numbers, int64_t width, int64_t* sums) {
  for (int64_t begin = 0; begin < count; begin += width) {
    const int64_t len = std::min(width, count - begin);
    uint64_t sum = 0;
    for (int64_t i = 0; i < len; ++i) {
      sum += static_cast<uint64_t>(static_cast<int64_t>(words[begin + i])) * static_cast<uint64_t>(numbers[i]);
    }
    *sums++ = static_cast<int64_t>(sum);
  }
}

} // namespace
} // namespace trainer

using namespace trainer;

extern "C" {

// The sum of each row of `numbers.numel()` words, the last one perhaps shorter: each word, read as a signed number,
// times the number of its place, modulo 2^64.
int32_t trn_row_sums(const at::Tensor* words, const at::Tensor* numbers, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    TORCH_CHECK(
        words->device().is_cpu() && words->is_contiguous() && numbers->device().is_cpu() && numbers->is_contiguous(),
        "words and their numbers must be contiguous, on the CPU");
    TORCH_CHECK(numbers->scalar_type() == at::kLong && numbers->numel() > 0, "a row of int64 numbers is wanted");
    const int64_t count = words->numel(), width = numbers->numel();
    auto sums = at::empty({(count + width - 1) / width}, at::TensorOptions().dtype(at::kLong));
    const auto* const by = numbers->const_data_ptr<int64_t>();
    auto* const into = sums.mutable_data_ptr<int64_t>();
    if (words->scalar_type() == at::kInt) {
      sum_rows(words->const_data_ptr<int32_t>(), count, by, width, into);
    } else if (words->scalar_type() == at::kShort) {
      sum_rows(words->const_data_ptr<int16_t>(), count, by, width, into);
    } else {
      TORCH_CHECK(false, "words of ", words->scalar_type(), ", not of 32 or 16 bits");
    }
    *out = new at::Tensor(std::move(sums));
  });
}

} // extern "C"
