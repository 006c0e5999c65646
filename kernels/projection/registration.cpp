// Declares the projection ops and registers their CPU kernels through PyTorch's stable ABI: one library for every torch
// >= 2.11 and every Python. Allocates results, chooses the instruction set. registration_cuda.cpp does it for CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "arguments.h"
#include "projection.h"

namespace {

using fastres::Arguments;
using torch::stable::Tensor;

const fastres::CpuKernels& cpu_kernels() {
#if defined(FASTRES_X86)
  static const fastres::CpuKernels& chosen = []() -> const fastres::CpuKernels& {
    // PyTorch's own variable, so that one setting limits its kernels and these.
    const char* setting = std::getenv("ATEN_CPU_CAPABILITY");
    std::string_view limit = setting ? setting : "";
    bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx512 && limit != "avx2" && limit != "default") return fastres::avx512::kernels;
    if (has_avx2 && limit != "default") return fastres::avx2::kernels;
    return fastres::baseline::kernels;
  }();
  return chosen;
#else
  return fastres::baseline::kernels;
#endif
}

void parallel_for(int64_t tasks, fastres::Body body, void* context) {
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> gram_cpu(const Tensor& x, int64_t stride, bool hopper) {
  Arguments a("projection_gram", Arguments::Place::cpu, x, stride, hopper);
  int64_t c = a.shape.c;
  Tensor gram = torch::stable::new_empty(x, {c, c}, a.acc_type());
  Tensor total = torch::stable::new_empty(x, {c}, a.acc_type());
  Tensor pivot = torch::stable::new_empty(x, {c}, a.acc_type());
  cpu_kernels().gram(a.dtype, a.shape, x.const_data_ptr(), gram.mutable_data_ptr(), total.mutable_data_ptr(),
                     pivot.mutable_data_ptr(), parallel_for);
  return {gram, total, pivot};
}

Tensor fprop_cpu(const Tensor& x, const Tensor& weight, const Tensor& bn, const std::optional<Tensor>& residual,
                 bool relu, int64_t stride, bool hopper) {
  Arguments a("projection_fprop", Arguments::Place::cpu, x, stride, hopper);
  a.fprop(weight, &bn, residual);
  Tensor out = torch::stable::new_empty(x, {a.shape.n, a.shape.out_h(), a.shape.out_w(), a.shape.k});
  cpu_kernels().fprop(a.dtype, a.shape, x.const_data_ptr(), weight.const_data_ptr(), bn.const_data_ptr(),
                      data(residual), relu, out.mutable_data_ptr(), parallel_for);
  return out;
}

std::tuple<Tensor, Tensor> wgrad_cpu(const Tensor& g, const Tensor& x, const std::optional<Tensor>& out, bool with_sum,
                                     int64_t stride, bool hopper) {
  Arguments a("projection_wgrad", Arguments::Place::cpu, x, stride, hopper);
  a.wgrad(g, out);
  Tensor p = torch::stable::new_empty(x, {a.shape.k, a.shape.c}, a.acc_type());
  Tensor sum;  // None in Python
  if (with_sum) sum = torch::stable::new_empty(x, {a.shape.k}, a.acc_type());
  cpu_kernels().wgrad(a.dtype, a.shape, g.const_data_ptr(), x.const_data_ptr(), data(out), p.mutable_data_ptr(),
                      with_sum ? sum.mutable_data_ptr() : nullptr, parallel_for);
  return {p, sum};
}

void dgrad_cpu(const Tensor& dx, const Tensor& g, const Tensor& x, const Tensor& u, const std::optional<Tensor>& v,
               const std::optional<Tensor>& k, const std::optional<Tensor>& out, bool relu,
               const std::optional<Tensor>& v_scale, const std::optional<Tensor>& d, int64_t stride, bool hopper) {
  Arguments a("projection_dgrad", Arguments::Place::cpu, x, stride, hopper);
  a.dgrad(dx, g, u, v, k, out, v_scale, d);
  cpu_kernels().dgrad(a.dtype, a.shape, dx.mutable_data_ptr(), g.const_data_ptr(), x.const_data_ptr(),
                      u.const_data_ptr(), data(v), data(k), data(d), data(out), relu, parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY(fastres_projection, m) {
  m.def("gram(Tensor x, int stride, bool hopper=False) -> (Tensor gram, Tensor total, Tensor pivot)");
  m.def(
      "fprop(Tensor x, Tensor weight, Tensor bn, Tensor? residual, bool relu, int stride, bool hopper=False) "
      "-> Tensor out");
  m.def("conv(Tensor x, Tensor weight, int stride) -> (Tensor y, Tensor count, Tensor mean, Tensor m2)");
  m.def(
      "wgrad(Tensor g, Tensor x, Tensor? out, bool with_sum, int stride, bool hopper=False) "
      "-> (Tensor p, Tensor sum)");
  m.def(
      "dgrad(Tensor(a!) dx, Tensor g, Tensor x, Tensor u, Tensor? v, Tensor? k, Tensor? out, bool relu, "
      "Tensor? v_scale, Tensor? d, int stride, bool hopper=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_projection, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram_cpu));
  m.impl("fprop", TORCH_BOX(&fprop_cpu));
  m.impl("wgrad", TORCH_BOX(&wgrad_cpu));
  m.impl("dgrad", TORCH_BOX(&dgrad_cpu));
}
