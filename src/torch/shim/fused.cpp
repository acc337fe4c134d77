// Autograd functions that compute in one pass, forward and backward, what LibTorch's operations compute in several:
// RMSNorm, rotary turns, the gate of a feed-forward layer, and cross entropy. And linear layers whose weight gradient
// is added where it belongs.
//
// They save their inputs and nothing else but a number a row. On a CPU the loops are those of kernels.h, on a GPU the
// kernels of launch.h.
#include "shim.h"

#include <algorithm>
#include <atomic>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "direct.h"
#include "kernels.h"
#include "launch.h"

namespace trainer {

extern const Kernels kernels_base;
#ifdef TRAINER_KERNEL_LEVELS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// The levels that this machine has, the lowest first.
const std::vector<const Kernels*>& levels() {
  static const std::vector<const Kernels*> list = [] {
    std::vector<const Kernels*> known{&kernels_base};
#ifdef TRAINER_KERNEL_LEVELS
    if (__builtin_cpu_supports("avx2")) {
      known.push_back(&kernels_avx2);
    }
    if (__builtin_cpu_supports("avx512f")) {
      known.push_back(&kernels_avx512);
    }
#endif
    return known;
  }();
  return list;
}

// The level in use, if a test has chosen one.
std::atomic<size_t> chosen_level{SIZE_MAX};

const Kernels& kernels() {
  const auto& list = levels();
  return *list[std::min(chosen_level.load(std::memory_order_relaxed), list.size() - 1)];
}

Type type_of(const at::Tensor& tensor) {
  TORCH_CHECK(
      tensor.device().is_cpu() || tensor.device().is_cuda(), "there is no fused function for ", tensor.device());
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Type::kFloat;
    case at::kBFloat16:
      return Type::kBFloat16;
    default:
      TORCH_CHECK(false, "there is no fused function for ", tensor.scalar_type());
  }
}

void check_like(const at::Tensor& one, const at::Tensor& other) {
  TORCH_CHECK(
      one.scalar_type() == other.scalar_type() && one.sizes() == other.sizes() && one.device() == other.device(),
      "tensors of one type and the same extents are wanted: ", one.scalar_type(), " ", one.sizes(), " and ",
      other.scalar_type(), " ", other.sizes());
}

// The tensor as rows of its last extent: itself where they are evenly spaced, otherwise a copy.
at::Tensor as_rows(const at::Tensor& tensor) {
  auto rows = tensor.reshape({-1, tensor.size(-1)});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

Rows rows(const at::Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0)};
}

// Elements that are worth a thread.
constexpr int64_t kGrain = 32768;

template <class Body>
void for_rows(int64_t count, int64_t width, const Body& body) {
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)), body);
}

// Parts into which the rows are split to add up a weight's gradient: as many on every machine.
constexpr int64_t kParts = 32;

struct RmsNorm : public Function<RmsNorm> {
  static at::Tensor forward(
      AutogradContext* context, const at::Tensor& x, const at::Tensor& weight, double eps, bool plus_one) {
    const auto type = type_of(x);
    TORCH_CHECK(
        weight.dim() == 1 && weight.size(0) == x.size(-1) && weight.device() == x.device() &&
            at::isFloatingType(weight.scalar_type()),
        "a norm of ", x.sizes(), " with a weight of ", weight.sizes());
    const auto inputs = as_rows(x);
    auto factors = weight.to(at::kFloat).contiguous();
    if (plus_one) {
      factors = factors.add(1.0);
    }
    auto y = at::empty(x.sizes(), x.options());
    const auto outputs = y.view({-1, x.size(-1)});
    const auto scales = at::empty({inputs.size(0)}, x.options().dtype(at::kFloat));
    if (is_for_gpu(x)) {
      gpu::rms_norm(
          x.device(), type, rows(inputs), factors.const_data_ptr<float>(), static_cast<float>(eps), rows(outputs),
          scales.mutable_data_ptr<float>(), inputs.size(0), inputs.size(1));
    } else {
      for_rows(inputs.size(0), inputs.size(1), [&](int64_t begin, int64_t end) {
        kernels().rms_norm(
            type, rows(inputs), factors.const_data_ptr<float>(), static_cast<float>(eps), rows(outputs),
            scales.mutable_data_ptr<float>(), begin, end, inputs.size(1));
      });
    }
    context->save_for_backward({x, factors, scales});
    context->saved_data["type"] = static_cast<int64_t>(weight.scalar_type());
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved.at(0), &factors = saved.at(1), &scales = saved.at(2);
    const auto inputs = as_rows(x), given = as_rows(grads.at(0));
    const int64_t count = inputs.size(0), width = inputs.size(1);
    const auto type = type_of(x);
    at::Tensor dx, dweight, parts;
    Rows to{nullptr, 0};
    if (context->needs_input_grad(0)) {
      dx = at::empty(x.sizes(), x.options());
      to = {dx.data_ptr(), width};
    }
    const auto* weights = factors.const_data_ptr<float>();
    const auto* scaled = scales.const_data_ptr<float>();
    const bool by_kernel = is_for_gpu(x);
    const int64_t split = std::min(count, by_kernel ? gpu::kParts : kParts);
    at::Tensor total;
    if (context->needs_input_grad(1)) {
      // A kernel writes all of them; the loops add to them.
      parts = by_kernel && split > 0 ? at::empty({split, width}, factors.options())
                                     : at::zeros({split, width}, factors.options());
      total = count > 0 ? at::empty({width}, factors.options()) : at::zeros({width}, factors.options());
    }
    if (by_kernel) {
      if (dx.defined()) {
        gpu::rms_norm_backward(x.device(), type, rows(inputs), weights, scaled, rows(given), to, count, width);
      }
      if (parts.defined()) {
        gpu::rms_norm_weight(
            x.device(), type, rows(inputs), scaled, rows(given), parts.mutable_data_ptr<float>(), split,
            total.mutable_data_ptr<float>(), count, width);
      }
    } else {
      at::parallel_for(0, split, count * width < kGrain ? split : 1, [&](int64_t first, int64_t last) {
        for (int64_t part = first; part < last; ++part) {
          kernels().rms_norm_backward(
              type, rows(inputs), weights, scaled, rows(given), to,
              parts.defined() ? parts.mutable_data_ptr<float>() + part * width : nullptr, part * count / split,
              (part + 1) * count / split, width);
        }
      });
      if (parts.defined()) {
        kernels().add_up(parts.const_data_ptr<float>(), split, width, total.mutable_data_ptr<float>());
      }
    }
    if (total.defined()) {
      dweight = total.to(static_cast<at::ScalarType>(context->saved_data["type"].toInt()));
    }
    return {dx, dweight, at::Tensor(), at::Tensor()};
  }
};

// A view of x `[batch, tokens, heads, head]` for the kernel: the last extent is contiguous.
Heads heads(const at::Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

at::Tensor rotated(const at::Tensor& given, const at::Tensor& cos, const at::Tensor& sin, bool inverse) {
  const auto type = type_of(given);
  const auto x = given.stride(3) == 1 ? given : given.contiguous();
  auto y = at::empty(x.sizes(), x.options());
  const RotaryExtents extents{x.size(1), x.size(2), x.size(3), cos.size(-1)};
  const Turns turns{
      cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), cos.dim() == 4 && cos.size(0) > 1 ? cos.stride(0) : 0,
      cos.stride(-3)};
  if (is_for_gpu(x)) {
    gpu::rotate(x.device(), type, heads(x), turns, heads(y), extents, inverse, x.size(0) * x.size(1));
    return y;
  }
  for_rows(x.size(0) * x.size(1), x.size(2) * x.size(3), [&](int64_t begin, int64_t end) {
    kernels().rotate(type, heads(x), turns, heads(y), extents, inverse, begin, end);
  });
  return y;
}

struct Rotate : public Function<Rotate> {
  static at::Tensor forward(
      AutogradContext* context, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
    for (const auto& table : {cos, sin}) {
      TORCH_CHECK(
          x.dim() == 4 && (table.dim() == 3 || table.dim() == 4) && table.scalar_type() == at::kFloat &&
              table.device() == x.device() && table.size(-3) == x.size(1) && table.size(-2) == 1 &&
              table.size(-1) <= x.size(3) && table.size(-1) % 2 == 0 &&
              (table.dim() == 3 || table.size(0) == 1 || table.size(0) == x.size(0)),
          "a turn of ", x.sizes(), " by tables of ", table.sizes());
    }
    check_like(cos, sin);
    const auto c = cos.contiguous(), s = sin.contiguous();
    context->save_for_backward({c, s});
    return rotated(x, c, s, /*inverse=*/false);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    return {rotated(grads.at(0), saved.at(0), saved.at(1), /*inverse=*/true), at::Tensor(), at::Tensor()};
  }
};

at::Tensor gated(const at::Tensor& gate, const at::Tensor& up, Activation act) {
  const auto type = type_of(gate);
  const auto gates = as_rows(gate), ups = as_rows(up);
  auto y = at::empty(gate.sizes(), gate.options());
  const auto outputs = y.view({-1, gate.size(-1)});
  if (is_for_gpu(gate)) {
    gpu::gate(gate.device(), type, act, rows(gates), rows(ups), rows(outputs), gates.size(0), gates.size(1));
    return y;
  }
  for_rows(gates.size(0), gates.size(1), [&](int64_t begin, int64_t end) {
    kernels().gate(type, act, rows(gates), rows(ups), rows(outputs), begin, end, gates.size(1));
  });
  return y;
}

void gated_backward(
    const at::Tensor& given, const at::Tensor& gate, const at::Tensor& up, Activation act, const at::Tensor& dgate,
    const at::Tensor& dup) {
  const auto type = type_of(gate);
  const auto gates = as_rows(gate), ups = as_rows(up), d = as_rows(given);
  if (is_for_gpu(gate)) {
    gpu::gate_backward(
        gate.device(), type, act, rows(gates), rows(ups), rows(d), rows(dgate), rows(dup), gates.size(0),
        gates.size(1));
    return;
  }
  for_rows(gates.size(0), gates.size(1), [&](int64_t begin, int64_t end) {
    kernels().gate_backward(
        type, act, rows(gates), rows(ups), rows(d), rows(dgate), rows(dup), begin, end, gates.size(1));
  });
}

struct Gate : public Function<Gate> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& gate, const at::Tensor& up, int64_t act) {
    check_like(gate, up);
    context->save_for_backward({gate, up});
    context->saved_data["act"] = act;
    return gated(gate, up, static_cast<Activation>(act));
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &gate = saved.at(0), &up = saved.at(1);
    auto dgate = at::empty(gate.sizes(), gate.options()), dup = at::empty(gate.sizes(), gate.options());
    const int64_t width = gate.size(-1);
    gated_backward(
        grads.at(0), gate, up, static_cast<Activation>(context->saved_data["act"].toInt()), dgate.view({-1, width}),
        dup.view({-1, width}));
    return {dgate, dup, at::Tensor()};
  }
};

// Both halves in one tensor, and their gradients, too.
struct GateOfBoth : public Function<GateOfBoth> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& both, int64_t act) {
    TORCH_CHECK(both.dim() > 0 && both.size(-1) % 2 == 0, "a gate and what passes it in ", both.sizes());
    context->save_for_backward({both});
    context->saved_data["act"] = act;
    const auto halves = both.chunk(2, -1);
    return gated(halves.at(0), halves.at(1), static_cast<Activation>(act));
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto both = context->get_saved_variables().at(0);
    const auto halves = both.chunk(2, -1);
    auto dboth = at::empty(both.sizes(), both.options());
    const auto to = dboth.view({-1, both.size(-1)}).chunk(2, -1);
    gated_backward(
        grads.at(0), halves.at(0), halves.at(1), static_cast<Activation>(context->saved_data["act"].toInt()),
        to.at(0), to.at(1));
    return {dboth, at::Tensor()};
  }
};

// A linear layer. The gradient of its weight is added to the leaf's own gradient where that may be done.
struct Linear : public Function<Linear> {
  static at::Tensor forward(
      AutogradContext* context,
      const at::Tensor& x,
      const at::Tensor& leaf,
      const at::Tensor& values,
      const std::optional<at::Tensor>& bias) {
    TORCH_CHECK(
        values.dim() == 2 && x.dim() > 0 && x.size(-1) == values.size(1) && x.scalar_type() == values.scalar_type() &&
            leaf.sizes() == values.sizes() && leaf.scalar_type() == at::kFloat && !values.requires_grad(),
        "a linear layer of ", values.scalar_type(), " ", values.sizes(), " for ", x.scalar_type(), " ", x.sizes());
    context->save_for_backward({x, values});
    context->saved_data["leaf"] = leaf;
    if (bias.has_value()) {
      context->saved_data["bias"] = static_cast<int64_t>(bias->scalar_type());
    }
    return at::linear(x, values, bias);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved.at(0), &values = saved.at(1);
    const auto given = grads.at(0).reshape({-1, values.size(0)});
    at::Tensor dx, dweight, dbias;
    if (context->needs_input_grad(0)) {
      dx = given.mm(values).view(x.sizes());
    }
    if (context->needs_input_grad(1)) {
      const auto inputs = x.reshape({-1, values.size(1)});
      auto* own = own_gradient(context->saved_data["leaf"].toTensor());
      if (own != nullptr && values.scalar_type() == at::kFloat) {
        own->addmm_(given.t(), inputs);
      } else if (own != nullptr) {
        own->add_(given.t().mm(inputs));
      } else {
        dweight = given.t().mm(inputs).to(at::kFloat);
      }
    }
    // A bias that is missing has no edge in the graph.
    if (context->saved_data.count("bias") != 0 && context->needs_input_grad(3)) {
      dbias = given.sum(0, /*keepdim=*/false, at::kFloat)
                  .to(static_cast<at::ScalarType>(context->saved_data["bias"].toInt()));
    }
    return {dx, dweight, at::Tensor(), dbias};
  }
};

} // namespace
} // namespace trainer

using namespace trainer;

extern "C" {

// The number of levels of instructions that this machine has.
int32_t trn_fused_levels(uint64_t* out) {
  return guarded([&] { *out = levels().size(); });
}

// Uses this level from now on, on all threads; one beyond the last is the last.
int32_t trn_fused_use_level(uint64_t level) {
  return guarded([&] { chosen_level.store(static_cast<size_t>(level), std::memory_order_relaxed); });
}

int32_t trn_fused_rms_norm(
    const at::Tensor* x, const at::Tensor* weight, double eps, int32_t plus_one, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(RmsNorm::apply(*x, *weight, eps, plus_one != 0)); });
}

int32_t trn_fused_rotate(const at::Tensor* x, const at::Tensor* cos, const at::Tensor* sin, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(Rotate::apply(*x, *cos, *sin)); });
}

int32_t trn_fused_gate(const at::Tensor* gate, const at::Tensor* up, int32_t act, at::Tensor** out) {
  return guarded([&] {
    // A missing second tensor: the first has both.
    *out = new at::Tensor(
        up == nullptr ? GateOfBoth::apply(*gate, static_cast<int64_t>(act))
                      : Gate::apply(*gate, *up, static_cast<int64_t>(act)));
  });
}

// A missing bias is null.
int32_t trn_fused_linear(
    const at::Tensor* x,
    const at::Tensor* leaf,
    const at::Tensor* values,
    const at::Tensor* bias,
    at::Tensor** out) {
  return guarded([&] {
    const auto given = bias == nullptr ? std::optional<at::Tensor>() : std::optional<at::Tensor>(*bias);
    *out = new at::Tensor(Linear::apply(*x, *leaf, *values, given));
  });
}

// The losses of `scores` `[rows, vocabulary]`, fp32 `[rows]`. With `gradient` the scores become their gradients. A
// target outside the vocabulary is an error on a CPU; a GPU's targets are not read here, and its loss is then a NaN.
int32_t trn_fused_cross_entropy(
    const at::Tensor* scores, const at::Tensor* targets, int32_t gradient, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    const auto type = type_of(*scores);
    TORCH_CHECK(
        scores->dim() == 2 && scores->is_contiguous() && scores->size(1) > 0 && targets->dim() == 1 &&
            targets->is_contiguous() && targets->size(0) == scores->size(0) && targets->scalar_type() == at::kLong &&
            targets->device() == scores->device(),
        "the cross entropy of ", scores->sizes(), " with targets of ", targets->sizes());
    const int64_t width = scores->size(1);
    const auto* wanted = targets->const_data_ptr<int64_t>();
    auto losses = at::empty({scores->size(0)}, scores->options().dtype(at::kFloat));
    auto* to = losses.mutable_data_ptr<float>();
    if (is_for_gpu(*scores)) {
      gpu::cross_entropy(
          scores->device(), type, rows(*scores), wanted, to, gradient != 0, scores->size(0), width);
    } else {
      for (int64_t i = 0; i < targets->size(0); ++i) {
        TORCH_CHECK_INDEX(wanted[i] >= 0 && wanted[i] < width, "target ", wanted[i], " of ", width, " tokens");
      }
      for_rows(scores->size(0), width, [&](int64_t begin, int64_t end) {
        kernels().cross_entropy(type, rows(*scores), wanted, to, gradient != 0, begin, end, width);
      });
    }
    *out = new at::Tensor(std::move(losses));
  });
}

} // extern "C"
