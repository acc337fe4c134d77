// Gradients that a backward pass adds where they belong, in place of returning them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/graph_task.h>

namespace trainer {

// The leaf's own gradient, if what is added to it now counts as accumulated: it is there, in fp32, and the pass is one
// that accumulates all gradients. A pass that returns some of them (torch::autograd::grad) has chosen its nodes, and
// must get them. Otherwise null.
//
// Whoever adds to it returns an undefined gradient. The leaf's node in the graph still runs, once everything that
// contributes to it has: so hooks on it, a reducer's among them, see that it is complete.
inline at::Tensor* own_gradient(const at::Tensor& leaf) {
  const auto* chosen = torch::autograd::get_current_graph_task_exec_info();
  auto& grad = leaf.mutable_grad();
  const bool fits = grad.defined() && grad.scalar_type() == at::kFloat && grad.sizes() == leaf.sizes() &&
      grad.device() == leaf.device();
  return leaf.is_leaf() && fits && chosen != nullptr && chosen->empty() ? &grad : nullptr;
}

} // namespace trainer
