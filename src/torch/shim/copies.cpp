// Parameters whose values are kept in a copy of another type than their gradients.
//
// Autograd and the reducer know the leaf: its gradient is fp32; its own values are never read and need no memory. The
// copy is used for computing. The arithmetic equals that of an fp32 leaf that is cast where it is used: gradients
// arrive in the copy's type, become fp32, and are added up in fp32.
#include "shim.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "direct.h"

namespace trainer {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct AtUse : public Function<AtUse> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& /*leaf*/, const at::Tensor& copy) {
    return copy.detach();
  }
  static variable_list backward(AutogradContext*, variable_list grads) {
    return {grads.at(0).to(at::kFloat), at::Tensor()};
  }
};

struct Lookup : public Function<Lookup> {
  static at::Tensor forward(
      AutogradContext* context,
      const at::Tensor& /*leaf*/,
      const at::Tensor& copy,
      const at::Tensor& tokens) {
    context->save_for_backward({tokens});
    context->saved_data["rows"] = copy.size(0);
    return at::embedding(copy, tokens);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto tokens = context->get_saved_variables().at(0);
    const auto rows = context->saved_data["rows"].toInt();
    auto gradient = at::embedding_dense_backward(
        grads.at(0).to(at::kFloat), tokens, rows, /*padding_idx=*/-1, /*scale_grad_by_freq=*/false);
    return {std::move(gradient), at::Tensor(), at::Tensor()};
  }
};

// Adds `gradient · factor` to the leaf's own gradient where that may be done, and returns nothing; otherwise returns
// the product.
at::Tensor deliver(const at::Tensor& leaf, const at::Tensor& gradient, const at::Tensor& factor, bool direct) {
  if (auto* own = direct && gradient.scalar_type() == at::kFloat ? own_gradient(leaf) : nullptr) {
    // In two roundings, as where the product is returned and added by whoever gets it. The gradient is used once.
    auto scaled = gradient.detach();
    scaled.mul_(factor);
    own->add_(scaled);
    return {};
  }
  return gradient.mul(factor);
}

// A loss with gradients that were computed along with it: with respect to `hidden`, in any floating type, and to a
// leaf, in fp32. Either pair may be missing.
struct WithGradients : public Function<WithGradients> {
  static at::Tensor forward(
      AutogradContext* context,
      const at::Tensor& loss,
      const std::optional<at::Tensor>& hidden,
      const std::optional<at::Tensor>& leaf,
      const std::optional<at::Tensor>& hidden_gradient,
      const std::optional<at::Tensor>& leaf_gradient,
      double divisor,
      bool direct) {
    context->save_for_backward({hidden_gradient.value_or(at::Tensor()), leaf_gradient.value_or(at::Tensor())});
    context->saved_data["divisor"] = divisor;
    context->saved_data["direct"] = direct;
    if (hidden.has_value()) {
      context->saved_data["type"] = static_cast<int64_t>(hidden->scalar_type());
    }
    if (leaf.has_value()) {
      context->saved_data["leaf"] = *leaf;
    }
    return loss.clone();
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto factor = grads.at(0).div(context->saved_data["divisor"].toDouble());
    at::Tensor by_hidden, by_leaf;
    if (saved.at(0).defined()) {
      // The product is rounded once.
      by_hidden = saved.at(0).to(at::kFloat).mul(factor).to(
          static_cast<at::ScalarType>(context->saved_data["type"].toInt()));
    }
    if (saved.at(1).defined()) {
      by_leaf = deliver(
          context->saved_data["leaf"].toTensor(), saved.at(1), factor, context->saved_data["direct"].toBool());
    }
    return {grads.at(0), by_hidden, by_leaf, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

void check_pair(const at::Tensor& leaf, const at::Tensor& copy) {
  TORCH_CHECK(
      leaf.defined() && copy.defined() && leaf.sizes() == copy.sizes() && leaf.scalar_type() == at::kFloat &&
          !copy.requires_grad(),
      "a copy of the parameter's extents is wanted, without a gradient of its own, and a parameter in fp32");
}

} // namespace
} // namespace trainer

using namespace trainer;

extern "C" {

// The copy's values; their gradient becomes fp32 and goes to the leaf.
int32_t trn_copy_at_use(const at::Tensor* leaf, const at::Tensor* copy, at::Tensor** out) {
  return guarded([&] {
    check_pair(*leaf, *copy);
    *out = new at::Tensor(AtUse::apply(*leaf, *copy));
  });
}

// The copy's rows named by `tokens`; their gradients become fp32 and are added up in the leaf's rows.
int32_t trn_copy_lookup(const at::Tensor* leaf, const at::Tensor* copy, const at::Tensor* tokens, at::Tensor** out) {
  return guarded([&] {
    check_pair(*leaf, *copy);
    *out = new at::Tensor(Lookup::apply(*leaf, *copy, *tokens));
  });
}

// `loss`; its gradients are `hidden_gradient / divisor` with respect to `hidden` and `leaf_gradient / divisor` with
// respect to `leaf`. A pair of null pointers is none.
int32_t trn_with_gradients(
    const at::Tensor* loss,
    const at::Tensor* hidden,
    const at::Tensor* hidden_gradient,
    const at::Tensor* leaf,
    const at::Tensor* leaf_gradient,
    double divisor,
    int32_t direct,
    at::Tensor** out) {
  return guarded([&] {
    const auto pair = [](const at::Tensor* of, const at::Tensor* gradient) {
      TORCH_CHECK((of == nullptr) == (gradient == nullptr), "a gradient and what it is of are wanted");
      TORCH_CHECK(of == nullptr || of->sizes() == gradient->sizes(), "a gradient of other extents than its tensor");
    };
    pair(hidden, hidden_gradient);
    pair(leaf, leaf_gradient);
    const auto or_none = [](const at::Tensor* tensor) {
      return tensor == nullptr ? std::optional<at::Tensor>() : std::optional<at::Tensor>(*tensor);
    };
    *out = new at::Tensor(WithGradients::apply(
        *loss, or_none(hidden), or_none(leaf), or_none(hidden_gradient), or_none(leaf_gradient), divisor,
        direct != 0));
  });
}

} // extern "C"
