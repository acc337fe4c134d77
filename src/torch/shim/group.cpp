// Process groups and the gradient reducer, on LibTorch's c10d.
#include "shim.h"

#include <chrono>
#include <memory>
#include <optional>

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>
#ifdef USE_C10D_NCCL
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

namespace trainer {
namespace {

using std::chrono::milliseconds;

// A reducer whose first step is like every other step.
//
// c10d's own would, in its first steps, sort its buckets anew by the order in which gradients arrived, and multiply by
// 1/n instead of dividing by n where a gradient does not lie in its bucket yet. A resumed run would then differ in the
// last bit from the undisturbed one. Here buckets never change, and gradients lie in them from the start.
class FixedReducer final : public c10d::Reducer {
 public:
  FixedReducer(
      std::vector<at::Tensor> params,
      std::vector<std::vector<size_t>> buckets,
      c10::intrusive_ptr<c10d::ProcessGroup> group,
      int64_t first_bucket_bytes,
      int64_t bucket_bytes)
      : Reducer(
            std::move(params),
            std::move(buckets),
            std::move(group),
            /*expect_sparse_gradients=*/{},
            bucket_bytes,
            /*find_unused_parameters=*/false,
            /*gradient_as_bucket_view=*/true,
            /*param_names=*/{},
            first_bucket_bytes,
            /*skip_all_reduce_unused_params=*/false,
            /*use_python_reducer=*/false,
            /*bucket_bytes_cap_list=*/{}) {
    // Says that the one rebuild is done. Only not calling rebuild_buckets() would let the reducer gather the order of
    // arrival for ever, a list that grows with every step.
    has_rebuilt_bucket_ = true;
    at::NoGradGuard no_grad;
    for (auto& bucket : buckets_) {
      bucket.gradients.zero_();
      for (size_t i = 0; i < bucket.variables.size(); ++i) {
        bucket.variables[i].mutable_grad() = bucket.bucket_views_in[i];
      }
    }
  }
};

struct Store {
  c10::intrusive_ptr<c10d::TCPStore> store;
};

struct Group {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  at::Device device;
};

c10::intrusive_ptr<c10d::Backend> make_nccl(
    const c10::intrusive_ptr<c10d::Store>& store,
    int rank,
    int size,
    milliseconds timeout,
    at::Device device) {
#ifdef USE_C10D_NCCL
  c10::cuda::CUDAGuard guard(device);
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, size, std::move(options));
#else
  (void)store, (void)rank, (void)size, (void)timeout, (void)device;
  TORCH_CHECK(false, "built without CUDA, so without NCCL");
#endif
}

// Backends send raw memory.
void check_dense(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined() && tensor.is_contiguous(), "the tensor is not contiguous");
}

} // namespace
} // namespace trainer

using namespace trainer;

extern "C" {

// Takes the listening socket over.
int32_t trn_store_serve(const char* host, uint16_t port, int32_t listener, int64_t timeout_ms, Store** out) {
  return guarded(Touches::kNetwork, [&] {
    c10d::TCPStoreOptions options;
    options.isServer = true;
    options.port = port;
    options.masterListenFd = listener;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    *out = new Store{c10::make_intrusive<c10d::TCPStore>(host, options)};
  });
}

int32_t trn_store_connect(const char* host, uint16_t port, int64_t timeout_ms, Store** out) {
  return guarded(Touches::kNetwork, [&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    *out = new Store{c10::make_intrusive<c10d::TCPStore>(host, options)};
  });
}

int32_t trn_store_free(Store* store) {
  return guarded([&] { delete store; });
}

// `address`: the local address that Gloo binds to and tells its peers.
int32_t trn_group_new(
    int32_t nccl,
    const Store* store,
    const char* prefix,
    const char* address,
    int32_t rank,
    int32_t size,
    int64_t timeout_ms,
    int32_t device_index,
    Group** out) {
  return guarded(Touches::kOnlyNetwork, [&] {
    const auto device = device_of(device_index);
    const milliseconds timeout(timeout_ms);
    c10::intrusive_ptr<c10d::Store> scoped = c10::make_intrusive<c10d::PrefixStore>(prefix, store->store);
    scoped->setTimeout(timeout);
    c10::intrusive_ptr<c10d::Backend> backend;
    c10d::ProcessGroup::BackendType type{};
    if (nccl != 0) {
      type = c10d::ProcessGroup::BackendType::NCCL;
      backend = make_nccl(scoped, rank, size, timeout, device);
    } else {
      type = c10d::ProcessGroup::BackendType::GLOO;
      auto options = c10d::ProcessGroupGloo::Options::create(timeout);
      options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(address));
      backend = c10::make_intrusive<c10d::ProcessGroupGloo>(scoped, rank, size, std::move(options));
    }
    auto group = c10::make_intrusive<c10d::ProcessGroup>(scoped, rank, size);
    group->setBackend(device.type(), type, backend);
    group->setDefaultBackend(type);
    group->setGroupName(prefix);
    *out = new Group{std::move(group), device};
  });
}

int32_t trn_group_free(Group* group) {
  return guarded(Touches::kNetwork, [&] { delete group; });
}

int32_t trn_group_all_reduce_sum(const Group* group, const at::Tensor* tensor) {
  return guarded(Touches::kNetwork, [&] {
    at::NoGradGuard no_grad;
    check_dense(*tensor);
    std::vector<at::Tensor> tensors{*tensor};
    group->group->allreduce(tensors)->wait();
  });
}

int32_t trn_group_broadcast(const Group* group, const at::Tensor* tensor, int32_t root) {
  return guarded(Touches::kNetwork, [&] {
    at::NoGradGuard no_grad;
    check_dense(*tensor);
    c10d::BroadcastOptions options;
    options.rootRank = root;
    std::vector<at::Tensor> tensors{*tensor};
    group->group->broadcast(tensors, options)->wait();
  });
}

int32_t trn_group_barrier(const Group* group) {
  return guarded(Touches::kNetwork, [&] {
    c10d::BarrierOptions options;
    options.device = group->device;
    group->group->barrier(options)->wait();
  });
}

int32_t trn_group_abort(const Group* group) {
  return guarded(Touches::kNetwork, [&] { group->group->abort(); });
}

int32_t trn_reducer_new(
    const at::Tensor* const* params,
    size_t count,
    const Group* group,
    int64_t first_bucket_bytes,
    int64_t bucket_bytes,
    FixedReducer** out) {
  return guarded([&] {
    auto tensors = list(params, count);
    TORCH_CHECK(!tensors.empty(), "a reducer needs at least one parameter");
    for (const auto& tensor : tensors) {
      TORCH_CHECK(tensor.is_leaf() && tensor.requires_grad(), "a parameter must be a leaf that requires a gradient");
    }
    // Gradients arrive about in the reverse of the order in which the parameters were made.
    std::vector<at::Tensor> reversed(tensors.rbegin(), tensors.rend());
    std::vector<int64_t> indices;
    for (size_t i = count; i-- > 0;) {
      indices.push_back(static_cast<int64_t>(i));
    }
    auto [buckets, limits] = c10d::compute_bucket_assignment_by_size(
        reversed,
        {static_cast<size_t>(first_bucket_bytes), static_cast<size_t>(bucket_bytes)},
        /*expect_sparse_gradient=*/{},
        indices);
    *out = new FixedReducer(
        std::move(tensors), std::move(buckets), group->group, first_bucket_bytes, bucket_bytes);
  });
}

int32_t trn_reducer_free(FixedReducer* reducer) {
  return guarded(Touches::kNetwork, [&] { delete reducer; });
}

int32_t trn_reducer_backward(FixedReducer* reducer, const at::Tensor* loss, int32_t reduce) {
  return guarded(Touches::kNetwork, [&] {
    if (reduce != 0) {
      reducer->prepare_for_forward();
      reducer->prepare_for_backward({*loss});
    }
    loss->backward();
    if (reduce != 0) {
      // Without this a parameter that the loss does not depend on would leave its bucket unreduced, and nobody would know.
      reducer->check_finalized();
    }
  });
}

} // extern "C"
