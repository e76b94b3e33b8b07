// The operations' schemas; torch.ops.nvmm.*, or nvmm_simulated.* in the simulator's library.
#include "tensors.h"

#ifdef NVMM_SIMULATED
#include "simulator.h"

// order: forward 0, reverse 1, shuffled 2; threads: of every block, 0 as the launch says.
void configure(int64_t order, int64_t threads) {
  nvmm::simulator::settings = {static_cast<nvmm::simulator::Order>(order),
                               static_cast<unsigned>(threads)};
}
STABLE_TORCH_LIBRARY_IMPL(nvmm_simulated, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
}
#endif

NVMM_LIBRARY(m) {
#ifdef NVMM_SIMULATED
  m.def("configure(int order, int threads) -> ()");
#endif
  m.def(
      "norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool rms,"
      " bool zero_centered) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "norm_backward(Tensor dy, Tensor? dsum, Tensor h, Tensor weight, Tensor mean, Tensor rstd,"
      " bool rms, bool zero_centered) -> (Tensor, Tensor, Tensor)");
  m.def("activation(Tensor x, Tensor? bias, int kind) -> Tensor");
  m.def("activation_backward(Tensor dy, Tensor x, Tensor? bias, int kind) -> (Tensor, Tensor)");
  m.def(
      "gated_residual(Tensor residual, Tensor branch, Tensor? bias, Tensor gate, Tensor? mask,"
      " bool tanh) -> Tensor");
  m.def(
      "gated_residual_backward(Tensor dy, Tensor branch, Tensor? bias, Tensor gate, Tensor? mask,"
      " bool tanh) -> (Tensor, Tensor)");
  m.def(
      "logits_reduce(Tensor logits, Tensor labels, int first, int valid, Tensor(a!) maximum,"
      " Tensor(b!) total, Tensor(c!) picked) -> ()");
  m.def(
      "logits_gradient(Tensor(a!) logits, Tensor labels, Tensor logsumexp, Tensor scale,"
      " int first, int valid) -> ()");
  m.def("rope(Tensor q, Tensor k, Tensor table, bool inverse) -> (Tensor, Tensor)");
  m.def("merge(Tensor base, Tensor values, Tensor source) -> Tensor");
  m.def("merge_backward(Tensor dy, Tensor target, int base_rows) -> (Tensor, Tensor)");
  m.def("pixel_shuffle(Tensor x, int factor) -> Tensor");
  m.def("pixel_shuffle_backward(Tensor dy, int factor) -> Tensor");
  m.def(
      "adamw(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] masters, Tensor(c!)[] means,"
      " Tensor(d!)[] squares, float lr, float beta1, float beta2, float eps, float weight_decay,"
      " int step, bool decoupled) -> ()");
  m.def("joint_norm_squares(Tensor x, int real) -> Tensor");
  m.def("joint_norm_apply(Tensor x, Tensor weight, Tensor scale, int first, int real) -> Tensor");
  m.def(
      "joint_norm_sums(Tensor dy, Tensor x, Tensor weight, Tensor scale, int first, int real)"
      " -> (Tensor, Tensor)");
  m.def(
      "joint_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor scale, Tensor dots, int first,"
      " int real) -> Tensor");
  m.def("multi_tensor_l2norm(Tensor[] tensors, Tensor(a!) flag) -> Tensor");
  m.def(
      "multi_tensor_scale(Tensor[] sources, Tensor(a!)[] targets, Tensor(b!) flag, float factor)"
      " -> ()");
}
