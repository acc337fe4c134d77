// Process groups and the gradient reducer, on LibTorch's c10d.
#include "shim.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
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

// One exchange of chunks: each rank gets the sum of its own chunk over all ranks.
//
// `flat` has as many equal chunks as there are ranks; chunk r is for rank r. Gloo's own reduce-scatter (2.11.0) is a
// copy and an all-reduce, twice the traffic. Here ranks exchange chunks, and each adds up those that it receives, in
// the order of ranks: so the sum of an element does not depend on its place.
class Exchange {
 public:
  Exchange(const c10::intrusive_ptr<c10d::ProcessGroup>& group, const at::Tensor& flat)
      : rank_(group->getRank()), size_(group->getSize()), flat_(flat) {
    at::NoGradGuard no_grad;
    if (flat_.is_cuda()) {
      auto own = chunk(flat_, rank_);
      work_ = group->_reduce_scatter_base(own, flat_);
    } else {
      received_ = at::empty_like(flat_);
      std::vector<int64_t> equal;
      work_ = group->alltoall_base(received_, flat_, equal, equal);
    }
  }

  // Bytes of memory that it has beside `flat`.
  uint64_t held() const {
    return received_.defined() ? received_.nbytes() : 0;
  }

  bool arrived() const {
    return work_->isCompleted();
  }

  // The sum, in the exchange's own memory or in `flat`. Sums on the calling thread: a thread of Gloo's would start its
  // own team of compute threads.
  at::Tensor sum() {
    at::NoGradGuard no_grad;
    work_->wait();
    if (!received_.defined()) {
      return chunk(flat_, rank_);
    }
    auto sum = chunk(received_, 0);
    for (int rank = 1; rank < size_; ++rank) {
      sum.add_(chunk(received_, rank));
    }
    return sum;
  }

 private:
  at::Tensor chunk(const at::Tensor& memory, int rank) const {
    const auto length = memory.numel() / size_;
    return memory.narrow(0, rank * length, length);
  }

  int rank_;
  int size_;
  at::Tensor flat_;
  at::Tensor received_;
  c10::intrusive_ptr<c10d::Work> work_;
};

// Gives each rank its own chunk of every bucket, averaged over the ranks, behind the backward pass.
//
// A bucket's memory is padded to as many equal chunks as there are ranks. Rank r's result is in chunk r; the other
// chunks hold no useful values. Buckets are added up in the order in which they were started, and on a CPU at most
// kUnderWay exchanges hold memory at a time: a backward pass that is faster than the network waits for it.
class Scatter {
 public:
  explicit Scatter(c10::intrusive_ptr<c10d::ProcessGroup> group) : group_(std::move(group)) {}

  // Memory for a bucket of `length` elements; the bucket's number is the call's number.
  at::Tensor add(int64_t chunk, int64_t length, const at::TensorOptions& options) {
    TORCH_CHECK(
        chunk > 0 && chunk <= INT64_MAX / group_->getSize() && chunk * group_->getSize() >= length,
        "chunks of ", chunk, " elements do not hold a bucket of ", length);
    buckets_.push_back(at::zeros({chunk * group_->getSize()}, options));
    return buckets_.back();
  }

  const at::Tensor& memory(size_t bucket) const {
    return buckets_.at(bucket);
  }

  void start(size_t index) {
    const auto& memory = buckets_.at(index);
    while (!memory.is_cuda() && !under_way_.empty() &&
           (under_way_.size() >= kUnderWay || under_way_.front().exchange.arrived())) {
      finish_first();
    }
    under_way_.push_back({index, Exchange(group_, memory)});
    ++started_;
    uint64_t held = 0;
    for (const auto& one : under_way_) {
      held += one.exchange.held();
    }
    most_held_ = std::max(most_held_, held);
  }

  void finish() {
    while (!under_way_.empty()) {
      finish_first();
    }
    TORCH_CHECK(started_ == buckets_.size(), "a bucket of gradients was not reduced");
    started_ = 0;
  }

  // The most bytes that exchanges have held at a time.
  uint64_t most_held() const {
    return most_held_;
  }

 private:
  static constexpr size_t kUnderWay = 2;

  struct UnderWay {
    size_t bucket;
    Exchange exchange;
  };

  void finish_first() {
    at::NoGradGuard no_grad;
    auto sum = under_way_.front().exchange.sum();
    const auto& memory = buckets_.at(under_way_.front().bucket);
    auto own = memory.narrow(0, group_->getRank() * sum.numel(), sum.numel());
    if (own.data_ptr() != sum.data_ptr()) {
      own.copy_(sum);
    }
    own.div_(group_->getSize());
    under_way_.pop_front();
  }

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::vector<at::Tensor> buckets_;
  std::deque<UnderWay> under_way_;
  size_t started_ = 0;
  uint64_t most_held_ = 0;
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

// An exchange on its way, and what its sum is added to.
struct Reducing {
  Exchange exchange;
  at::Tensor into;
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
  // Calls of NCCL return when they are done. With a bound device some versions of LibTorch choose otherwise.
  options->config.blocking = 1;
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, size, std::move(options));
#else
  (void)store, (void)rank, (void)size, (void)timeout, (void)device;
  TORCH_CHECK(false, "built without CUDA, so without NCCL");
#endif
}

// Does once, with few bytes and with many, what every step does: NCCL makes a connection when it is first used, and
// chooses by the size which ones it uses. What fails here, and the time that it takes, is then no step's.
void warm_up(c10d::ProcessGroup& group, at::Device device, milliseconds timeout) {
#ifdef USE_C10D_NCCL
  at::NoGradGuard no_grad;
  c10::cuda::CUDAGuard guard(device);
  const auto finish = [&](const c10::intrusive_ptr<c10d::Work>& work) {
    // With a limit the host waits for the GPU, and for its error.
    TORCH_CHECK(work->wait(timeout), "the first collective of the group has failed");
  };
  for (const int64_t chunk : {int64_t{64}, int64_t{1} << 20}) {
    auto flat = at::ones({chunk * group.getSize()}, at::TensorOptions().dtype(at::kFloat).device(device));
    auto own = flat.narrow(0, group.getRank() * chunk, chunk);
    std::vector<at::Tensor> all{flat};
    finish(group.allreduce(all));
    finish(group._reduce_scatter_base(own, flat));
    finish(group._allgather_base(flat, own));
    // n ranks have summed ones, and then these sums.
    const auto size = static_cast<double>(group.getSize());
    TORCH_CHECK(flat.eq(size * size).all().item<bool>(), "the first collectives of the group have a wrong result");
  }
  std::vector<at::Tensor> one{at::ones({1}, at::TensorOptions().dtype(at::kFloat).device(device))};
  finish(group.broadcast(one));
#else
  (void)group, (void)device, (void)timeout;
#endif
}

// Backends send raw memory.
void check_dense(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined() && tensor.is_contiguous(), "the tensor is not contiguous");
}

// Elements of one of the equal chunks, one for each rank, that `flat` consists of.
int64_t check_chunks(const Group& group, const at::Tensor& flat) {
  check_dense(flat);
  const int64_t size = group.group->getSize();
  TORCH_CHECK(
      flat.dim() == 1 && flat.numel() % size == 0, "a list of ", flat.numel(), " elements has no ", size,
      " equal chunks");
  return flat.numel() / size;
}

void check_chunk(const at::Tensor& chunk, int64_t length, const at::Tensor& flat) {
  check_dense(chunk);
  TORCH_CHECK(
      chunk.dim() == 1 && chunk.numel() == length && chunk.scalar_type() == flat.scalar_type() &&
          chunk.device() == flat.device(),
      "a chunk of ", length, " elements is wanted, of its list's type and on its device");
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
    if (nccl != 0) {
      // Handed to the backend with it: no collective has to guess its GPU.
      group->setBoundDeviceId(device);
    }
    group->setBackend(device.type(), type, backend);
    group->setDefaultBackend(type);
    group->setGroupName(prefix);
    if (nccl != 0) {
      // Otherwise NCCL makes its communicator in the first collective, and its failure would be a step's.
      backend->eagerConnectSingleDevice(device);
      warm_up(*group, device, timeout);
    }
    *out = new Group{std::move(group), device};
  });
}

// The limit of every collective that is begun from now on.
int32_t trn_group_set_timeout(const Group* group, int64_t timeout_ms) {
  return guarded([&] { group->group->setTimeout(milliseconds(timeout_ms)); });
}

// Another handle to the same group.
int32_t trn_group_share(const Group* group, Group** out) {
  return guarded([&] { *out = new Group{group->group, group->device}; });
}

// How many collectives were begun in the group by this rank.
int32_t trn_group_begun(const Group* group, uint64_t* out) {
  return guarded([&] { *out = group->group->getSequenceNumberForGroup(); });
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

// Starts to fill every chunk of `flat` (as many equal ones as there are ranks) with that of its rank. `own`: this
// rank's; null: it is in its place in `flat`.
int32_t trn_group_all_gather(const Group* group, const at::Tensor* flat, const at::Tensor* own, Pending** out) {
  return guarded(Touches::kNetwork, [&] {
    at::NoGradGuard no_grad;
    const auto length = check_chunks(*group, *flat);
    // As bytes: not every backend knows every type.
    auto output = flat->detach().view(at::kByte);
    const auto bytes = length * static_cast<int64_t>(flat->element_size());
    auto input = output.narrow(0, group->group->getRank() * bytes, bytes);
    if (own != nullptr) {
      check_chunk(*own, length, *flat);
      input = own->detach().view(at::kByte);
    }
    *out = new Pending{group->group->_allgather_base(output, input)};
  });
}

// Starts to add the sum of this rank's chunk of `flat` over all ranks to `into`.
int32_t trn_group_reduce_scatter(const Group* group, const at::Tensor* flat, const at::Tensor* into, Reducing** out) {
  return guarded(Touches::kNetwork, [&] {
    check_chunk(*into, check_chunks(*group, *flat), *flat);
    *out = new Reducing{Exchange(group->group, flat->detach()), into->detach()};
  });
}

int32_t trn_reducing_finish(Reducing* reducing) {
  return guarded(Touches::kNetwork, [&] {
    at::NoGradGuard no_grad;
    reducing->into.add_(reducing->exchange.sum());
  });
}

int32_t trn_reducing_free(Reducing* reducing) {
  return guarded(Touches::kNetwork, [&] { delete reducing; });
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

// From here on each gradient that arrives is the last of its step.
int32_t trn_reducer_begin(FixedReducer* reducer) {
  return guarded(Touches::kNetwork, [&] {
    reducer->prepare_for_forward();
    reducer->prepare_for_backward({});
  });
}

// Waits for the averages.
int32_t trn_reducer_end(FixedReducer* reducer) {
  return guarded(Touches::kNetwork, [&] {
    // Without this, a parameter that the loss does not depend on would silently leave its bucket unreduced.
    reducer->check_finalized();
    if (auto* scatter = reducer->scatter()) {
      scatter->finish();
    }
  });
}

// The most bytes that a sharded reducer's exchanges have held at a time, beside the buckets.
int32_t trn_reducer_most_held(const FixedReducer* reducer, uint64_t* out) {
  return guarded([&] { *out = reducer->scatter() == nullptr ? 0 : reducer->scatter()->most_held(); });
}

// Runs a backward pass from `outputs`, whose gradients are `gradients`, and adds to those of the leaves. It may run a
// reducer's collectives.
int32_t trn_backward_from(const at::Tensor* const* outputs, const at::Tensor* const* gradients, size_t count) {
  return guarded(
      Touches::kNetwork, [&] { torch::autograd::backward(list(outputs, count), list(gradients, count)); });
}

// Lets the gradient of a leaf be added to `memory`, which has its extents.
int32_t trn_place_gradient(const at::Tensor* leaf, const at::Tensor* memory) {
  return guarded([&] {
    TORCH_CHECK(
        leaf->is_leaf() && leaf->requires_grad() && leaf->sizes() == memory->sizes() &&
            leaf->scalar_type() == memory->scalar_type() && leaf->device() == memory->device() &&
            !memory->requires_grad(),
        "a gradient's memory is wanted that has the extents, the type and the device of a leaf");
    leaf->mutable_grad() = *memory;
  });
}

} // extern "C"
