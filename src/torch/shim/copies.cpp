// Parameters whose values are kept in a copy of another type than their gradients.
//
// Autograd and the reducer know the leaf: its gradient is fp32; its own values are never read and need no memory. The
// copy is used for computing. The arithmetic equals that of an fp32 leaf that is cast where it is used: gradients
// arrive in the copy's type, become fp32, and are added up in fp32.
#include "shim.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

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

struct WithGradient : public Function<WithGradient> {
  static at::Tensor forward(
      AutogradContext* context,
      const at::Tensor& loss,
      const at::Tensor& /*leaf*/,
      const at::Tensor& gradient,
      double divisor) {
    context->save_for_backward({gradient});
    context->saved_data["divisor"] = divisor;
    return loss.clone();
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto gradient = context->get_saved_variables().at(0);
    const auto factor = grads.at(0).div(context->saved_data["divisor"].toDouble());
    return {grads.at(0), gradient.mul(factor), at::Tensor(), at::Tensor()};
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

// `loss`; its gradient is `gradient / divisor` with respect to the leaf.
int32_t trn_with_gradient(
    const at::Tensor* loss,
    const at::Tensor* leaf,
    const at::Tensor* gradient,
    double divisor,
    at::Tensor** out) {
  return guarded([&] {
    TORCH_CHECK(leaf->sizes() == gradient->sizes(), "a gradient of other extents than its parameter");
    *out = new at::Tensor(WithGradient::apply(*loss, *leaf, *gradient, divisor));
  });
}

} // extern "C"
