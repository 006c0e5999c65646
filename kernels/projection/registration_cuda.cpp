// Registers the projection's CUDA kernels: allocates results and workspaces, guards the device, passes PyTorch's
// current stream. It includes no CUDA header.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "arguments.h"
#include "projection.h"

// Of libtorch_cuda. Weak, so that the library loads beside a torch without it. (aoti_torch_get_current_stream, which
// every torch has, gives a c10::Stream*, of which torch 2.11 cannot tell the cudaStream_t.)
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using fastres::Arguments;
using fastres::Pixels;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// While it lives, x's device is the current one.
class Device {
 public:
  explicit Device(const Arguments& a) : op_(a.op), guard_(a.device) {
    if (!aoti_torch_get_current_cuda_stream) fail("this torch has no aoti_torch_get_current_cuda_stream");
    if (aoti_torch_get_current_cuda_stream(a.device, &stream_)) fail("torch does not tell its current CUDA stream");
  }
  // run(arguments, stream) is one of the kernels.
  template <class A>
  void launch(const char* (*run)(const A&, void*), const A& arguments) const {
    if (const char* error = run(arguments, stream_)) fail(error);
  }

 private:
  [[noreturn]] void fail(const char* why) const { throw std::runtime_error(std::string(op_) + ": " + why); }

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// The stride of a dimension of one element says nothing, and as it is might make memory seem not to be aligned: a dense
// one stands in its place.
Pixels pixels(const Tensor& t, void* data) {
  int64_t w = t.size(2) == 1 ? (t.size(3) + 7) / 8 * 8 : t.stride(2);
  int64_t h = t.size(1) == 1 ? t.size(2) * w : t.stride(1);
  return {data, t.size(0) == 1 ? t.size(1) * h : t.stride(0), h, w};
}
Pixels pixels(const Tensor& t) { return pixels(t, const_cast<void*>(t.const_data_ptr())); }
Pixels written(const Tensor& t) { return pixels(t, t.mutable_data_ptr()); }
Pixels pixels(const std::optional<Tensor>& t) { return t ? pixels(*t) : Pixels{}; }
const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }
const float* floats(const std::optional<Tensor>& t) { return static_cast<const float*>(data(t)); }
float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}
Tensor new_output(const Tensor& x, const fastres::Shape& s) {
  return torch::stable::new_empty(x, {s.n, s.out_h(), s.out_w(), s.k});
}

std::tuple<Tensor, Tensor, Tensor> gram_cuda(const Tensor& x, int64_t stride, bool hopper) {
  Arguments a("projection_gram", Arguments::Place::cuda, x, stride, hopper);
  Device device(a);
  int64_t c = a.shape.c;
  Tensor gram = new_floats(x, {c, c}), total = new_floats(x, {c});
  Tensor pivot = torch::stable::new_zeros(x, {c}, ScalarType::Float);
  auto size = hopper ? fastres::hopper::gram_workspace : fastres::portable::gram_workspace;
  Tensor workspace = new_floats(x, {size(a.shape)});
  device.launch(hopper ? fastres::hopper::gram : fastres::portable::gram,
                {.dtype = a.dtype,
                 .shape = a.shape,
                 .x = pixels(x),
                 .gram = floats(gram),
                 .total = floats(total),
                 .workspace = floats(workspace)});
  return {gram, total, pivot};
}

Tensor fprop_cuda(const Tensor& x, const Tensor& weight, const Tensor& bn, const std::optional<Tensor>& residual,
                  bool relu, int64_t stride, bool hopper) {
  Arguments a("projection_fprop", Arguments::Place::cuda, x, stride, hopper);
  a.fprop(weight, &bn, residual);
  Device device(a);
  Tensor out = new_output(x, a.shape);
  device.launch(hopper ? fastres::hopper::fprop : fastres::portable::fprop,
                {.dtype = a.dtype,
                 .shape = a.shape,
                 .x = pixels(x),
                 .weight = weight.const_data_ptr(),
                 .bn = floats(bn),
                 .residual = pixels(residual),
                 .relu = relu,
                 .out = written(out),
                 .count = nullptr,
                 .mean = nullptr,
                 .m2 = nullptr});
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_cuda(const Tensor& x, const Tensor& weight, int64_t stride) {
  Arguments a("projection_conv", Arguments::Place::cuda, x, stride, false);
  a.fprop(weight, nullptr, std::nullopt);
  Device device(a);
  Tensor y = new_output(x, a.shape);
  int64_t partials = fastres::portable::fprop_partials(a.shape);
  Tensor count = new_floats(x, {partials});
  Tensor mean = new_floats(x, {partials, a.shape.k}), m2 = new_floats(x, {partials, a.shape.k});
  device.launch(fastres::portable::fprop, {.dtype = a.dtype,
                                           .shape = a.shape,
                                           .x = pixels(x),
                                           .weight = weight.const_data_ptr(),
                                           .bn = nullptr,
                                           .residual = {},
                                           .relu = false,
                                           .out = written(y),
                                           .count = floats(count),
                                           .mean = floats(mean),
                                           .m2 = floats(m2)});
  return {y, count, mean, m2};
}

std::tuple<Tensor, Tensor> wgrad_cuda(const Tensor& g, const Tensor& x, const std::optional<Tensor>& out,
                                      bool with_sum, int64_t stride, bool hopper) {
  Arguments a("projection_wgrad", Arguments::Place::cuda, x, stride, hopper);
  a.wgrad(g, out);
  Device device(a);
  Tensor p = new_floats(x, {a.shape.k, a.shape.c});
  Tensor sum;  // None in Python
  if (with_sum) sum = new_floats(x, {a.shape.k});
  auto size = hopper ? fastres::hopper::wgrad_workspace : fastres::portable::wgrad_workspace;
  Tensor workspace = new_floats(x, {size(a.shape)});
  device.launch(hopper ? fastres::hopper::wgrad : fastres::portable::wgrad,
                {.dtype = a.dtype,
                 .shape = a.shape,
                 .g = pixels(g),
                 .x = pixels(x),
                 .out = pixels(out),
                 .p = floats(p),
                 .sum = with_sum ? floats(sum) : nullptr,
                 .workspace = floats(workspace)});
  return {p, sum};
}

void dgrad_cuda(const Tensor& dx, const Tensor& g, const Tensor& x, const Tensor& u, const std::optional<Tensor>& v,
                const std::optional<Tensor>& k, const std::optional<Tensor>& out, bool relu,
                const std::optional<Tensor>& v_scale, const std::optional<Tensor>& d, int64_t stride, bool hopper) {
  Arguments a("projection_dgrad", Arguments::Place::cuda, x, stride, hopper);
  a.dgrad(dx, g, u, v, k, out, v_scale, d);
  Device device(a);
  device.launch(hopper ? fastres::hopper::dgrad : fastres::portable::dgrad,
                {.dtype = a.dtype,
                 .shape = a.shape,
                 .dx = written(dx),
                 .g = pixels(g),
                 .x = pixels(x),
                 .out = pixels(out),
                 .u = u.const_data_ptr(),
                 .v = data(v),
                 .k = floats(k),
                 .v_scale = floats(v_scale),
                 .d = floats(d),
                 .relu = relu});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastres_projection, CUDA, m) {
  m.impl("gram", TORCH_BOX(&gram_cuda));
  m.impl("fprop", TORCH_BOX(&fprop_cuda));
  m.impl("conv", TORCH_BOX(&conv_cuda));
  m.impl("wgrad", TORCH_BOX(&wgrad_cuda));
  m.impl("dgrad", TORCH_BOX(&dgrad_cuda));
}
