// Process groups and the gradient reducer, on LibTorch's c10d.
#include "shim.h"

#include <chrono>
#include <cstdint>
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

// Gives each rank its own chunk of every bucket, averaged over the ranks, behind the backward pass.
//
// A bucket's memory is padded to as many equal chunks as there are ranks. Rank r's result is in chunk r; the other
// chunks hold no useful values. Gloo's own reduce-scatter (2.11.0) is a copy and an all-reduce, twice the traffic. Here
// ranks exchange chunks, and each adds up those that it receives, in the order of ranks: so the sum of an element does
// not depend on its place.
class Scatter {
 public:
  explicit Scatter(c10::intrusive_ptr<c10d::ProcessGroup> group) : group_(std::move(group)) {}

  // Memory for a bucket of `length` elements; the bucket's number is the call's number.
  at::Tensor add(int64_t chunk, int64_t length, const at::TensorOptions& options) {
    TORCH_CHECK(
        chunk > 0 && chunk <= INT64_MAX / group_->getSize() && chunk * group_->getSize() >= length,
        "chunks of ", chunk, " elements do not hold a bucket of ", length);
    buckets_.push_back({at::zeros({chunk * group_->getSize()}, options), {}, {}});
    return buckets_.back().memory;
  }

  const at::Tensor& memory(size_t bucket) const {
    return buckets_.at(bucket).memory;
  }

  void start(size_t index) {
    at::NoGradGuard no_grad;
    auto& bucket = buckets_.at(index);
    if (bucket.memory.is_cuda()) {
      auto own = chunk(bucket.memory, group_->getRank());
      bucket.work = group_->_reduce_scatter_base(own, bucket.memory);
    } else {
      bucket.received = at::empty_like(bucket.memory);
      std::vector<int64_t> equal;
      bucket.work = group_->alltoall_base(bucket.received, bucket.memory, equal, equal);
    }
  }

  // Sums on the calling thread: a thread of Gloo's would start its own team of compute threads.
  void finish() {
    at::NoGradGuard no_grad;
    for (auto& bucket : buckets_) {
      TORCH_CHECK(bucket.work, "a bucket of gradients was not reduced");
      bucket.work->wait();
      auto own = chunk(bucket.memory, group_->getRank());
      if (bucket.received.defined()) {
        own.copy_(chunk(bucket.received, 0));
        for (int rank = 1; rank < group_->getSize(); ++rank) {
          own.add_(chunk(bucket.received, rank));
        }
      }
      own.div_(group_->getSize());
      bucket.work.reset();
      bucket.received.reset();
    }
  }

 private:
  struct Bucket {
    at::Tensor memory;
    at::Tensor received;
    c10::intrusive_ptr<c10d::Work> work;
  };

  at::Tensor chunk(const at::Tensor& memory, int rank) const {
    const auto length = memory.numel() / group_->getSize();
    return memory.narrow(0, rank * length, length);
  }

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::vector<Bucket> buckets_;
};

// Lets the reducer start a Scatter when a bucket is full, and continue without waiting for it.
class ScatterHook final : public c10d::CommHookInterface {
 public:
  explicit ScatterHook(std::shared_ptr<Scatter> scatter) : scatter_(std::move(scatter)) {}

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    scatter_->start(bucket.getIndex());
    std::vector<at::Device> devices;
    if (bucket.getBuffer().is_cuda()) {
      devices.push_back(bucket.getBuffer().device());
    }
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::TensorType::get(), std::move(devices));
    future->markCompleted(bucket.getBuffer());
    return future;
  }

  at::Tensor parseHookResult(const c10::IValue& result) override {
    return result.toTensor();
  }

 private:
  std::shared_ptr<Scatter> scatter_;
};

// A reducer whose first step is like every other step.
//
// In its first steps c10d's own reducer would sort its buckets anew by the order in which gradients arrived, and
// multiply by 1/n instead of dividing by n where a gradient is not in its bucket yet. A resumed run would then differ
// in the last bit from the undisturbed one. Here buckets never change, and gradients are in them from the start.
//
// With shard() each rank gets only its own chunk of every bucket's averages; see Scatter.
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
    // Reports that the one rebuild is done. If rebuild_buckets() were only never called, the reducer would collect the
    // order of arrival forever, in a list that grows with every step.
    has_rebuilt_bucket_ = true;
    at::NoGradGuard no_grad;
    for (auto& bucket : buckets_) {
      bucket.gradients.zero_();
      for (size_t i = 0; i < bucket.variables.size(); ++i) {
        bucket.variables[i].mutable_grad() = bucket.bucket_views_in[i];
      }
    }
  }

  // Before the first backward pass. `chunks`: elements of one rank's chunk, for every bucket.
  void shard(const int64_t* chunks) {
    at::NoGradGuard no_grad;
    scatter_ = std::make_shared<Scatter>(process_group_);
    for (size_t index = 0; index < buckets_.size(); ++index) {
      auto& bucket = buckets_[index];
      const auto length = bucket.gradients.numel();
      const auto memory = scatter_->add(chunks[index], length, bucket.gradients.options());
      bucket.gradients = memory.narrow(0, 0, length);
      for (size_t i = 0; i < bucket.variables.size(); ++i) {
        const auto view = bucket.gradients
                              .narrow(0, static_cast<int64_t>(bucket.offsets[i]), static_cast<int64_t>(bucket.lengths[i]))
                              .view(bucket.variables[i].sizes());
        bucket.bucket_views_in[i] = view;
        bucket.bucket_views_out[i] = view;
        bucket.variables[i].mutable_grad() = view;
      }
    }
    register_comm_hook(std::make_unique<ScatterHook>(scatter_));
  }

  Scatter* scatter() const {
    return scatter_.get();
  }

 private:
  std::shared_ptr<Scatter> scatter_;
};

struct Store {
  c10::intrusive_ptr<c10d::TCPStore> store;
};

struct Group {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  at::Device device;
};

// A collective on its way.
struct Pending {
  c10::intrusive_ptr<c10d::Work> work;
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

void check_parameters(const std::vector<at::Tensor>& tensors) {
  TORCH_CHECK(!tensors.empty(), "a reducer needs at least one parameter");
  for (const auto& tensor : tensors) {
    TORCH_CHECK(tensor.is_leaf() && tensor.requires_grad(), "a parameter must be a leaf that requires a gradient");
  }
}

} // namespace
} // namespace trainer

using namespace trainer;

extern "C" {

// Takes over the listening socket.
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

// `address`: the local address that Gloo binds to and announces to its peers.
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
    if (nccl != 0) {
      // Otherwise NCCL makes its communicator in the first collective, and its failure would be a step's.
      backend->eagerConnectSingleDevice(device);
    }
    *out = new Group{std::move(group), device};
  });
}

// The limit of every collective that is begun from now on.
int32_t trn_group_set_timeout(const Group* group, int64_t timeout_ms) {
  return guarded([&] { group->group->setTimeout(milliseconds(timeout_ms)); });
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

// Starts to fill every chunk of `flat` (as many equal ones as there are ranks) with that of its rank.
int32_t trn_group_all_gather(const Group* group, const at::Tensor* flat, Pending** out) {
  return guarded(Touches::kNetwork, [&] {
    at::NoGradGuard no_grad;
    check_dense(*flat);
    const int64_t size = group->group->getSize();
    TORCH_CHECK(
        flat->dim() == 1 && flat->numel() % size == 0, "a list of ", flat->numel(), " elements has no ", size,
        " equal chunks");
    // As bytes: not every backend knows every type.
    auto output = flat->detach().view(at::kByte);
    auto input = output.narrow(0, group->group->getRank() * (output.numel() / size), output.numel() / size);
    *out = new Pending{group->group->_allgather_base(output, input)};
  });
}

// Returns when the result is there (Gloo), or is ordered before all later work of the current stream (NCCL).
int32_t trn_pending_wait(const Pending* pending) {
  return guarded(Touches::kNetwork, [&] { pending->work->wait(); });
}

int32_t trn_pending_free(Pending* pending) {
  return guarded(Touches::kNetwork, [&] { delete pending; });
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
    check_parameters(tensors);
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

// Buckets as given: `lengths` numbers of parameters for each, one after the other in `indices`, and `chunks` elements
// for one rank.
int32_t trn_reducer_new_sharded(
    const at::Tensor* const* params,
    size_t count,
    const Group* group,
    const uint64_t* indices,
    const uint64_t* lengths,
    const int64_t* chunks,
    size_t bucket_count,
    FixedReducer** out) {
  return guarded([&] {
    auto tensors = list(params, count);
    check_parameters(tensors);
    std::vector<std::vector<size_t>> buckets;
    for (size_t i = 0; i < bucket_count; ++i) {
      buckets.emplace_back(indices, indices + lengths[i]);
      indices += lengths[i];
      for (const auto index : buckets.back()) {
        TORCH_CHECK(index < count, "a bucket names parameter ", index, " of ", count);
      }
    }
    auto reducer = std::make_unique<FixedReducer>(
        std::move(tensors), std::move(buckets), group->group, c10d::kDefaultFirstBucketBytes,
        c10d::kDefaultBucketBytesCap);
    reducer->shard(chunks);
    *out = reducer.release();
  });
}

// The padded memory of one bucket of a sharded reducer.
int32_t trn_reducer_bucket(const FixedReducer* reducer, size_t index, at::Tensor** out) {
  return guarded([&] {
    TORCH_CHECK(reducer->scatter() != nullptr, "the reducer is not sharded");
    *out = new at::Tensor(reducer->scatter()->memory(index));
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
      // Without this, a parameter that the loss does not depend on would silently leave its bucket unreduced.
      reducer->check_finalized();
      if (auto* scatter = reducer->scatter()) {
        scatter->finish();
      }
    }
  });
}

} // extern "C"
