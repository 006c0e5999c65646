// The projection kernels' interface: raw pointers and sizes, no torch header, so that kernels compile without torch.
#pragma once

#include <cstdint>

namespace fastres {

enum class Dtype { float32, float64, bfloat16, float16 };

// x is [N, H, W, C]. x_s = x[:, ::stride, ::stride] is read as a matrix of rows() rows of C elements.
struct Shape {
  int64_t n, h, w, c, k, stride;
  int64_t out_h() const { return (h + stride - 1) / stride; }
  int64_t out_w() const { return (w + stride - 1) / stride; }
  int64_t rows() const { return n * out_h() * out_w(); }
};

// Calls body(context, begin, end) on pieces of [0, tasks), in parallel.
using Body = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t tasks, Body body, void* context);

// One table per instruction set; what each entry computes stands in __init__.py. Tensors are dense; those named in
// __init__.py as "acc" are float64 for float64, else float32; the others have the dtype given. Optional ones may be
// null: v, k, d, residual, out (of wgrad and dgrad), sum.
struct CpuKernels {
  void (*gram)(Dtype, const Shape&, const void* x, void* gram, void* total, void* pivot, ParallelFor);
  void (*fprop)(Dtype, const Shape&, const void* x, const void* weight, const void* bn, const void* residual, bool relu,
                void* out, ParallelFor);
  void (*wgrad)(Dtype, const Shape&, const void* g, const void* x, const void* out, void* p, void* sum, ParallelFor);
  void (*dgrad)(Dtype, const Shape&, void* dx, const void* g, const void* x, const void* u, const void* v,
                const void* k, const void* d, const void* out, bool relu, ParallelFor);
};

// projection_cpu.cpp, compiled once per instruction set (CMakeLists.txt)
namespace baseline { extern const CpuKernels kernels; }
namespace avx2 { extern const CpuKernels kernels; }
namespace avx512 { extern const CpuKernels kernels; }

// A tensor [N, H, W, channels] on a GPU whose channels are contiguous; strides in elements. Null data: there is none.
struct Pixels {
  void* data;
  int64_t n_stride, h_stride, w_stride;
};

// Arguments of the CUDA kernels, for bfloat16 and float16. What is no Pixels is dense; weight, u and v have the dtype.
// rows() must be below 2^31. Where channels are no multiples of 8, or something is not aligned to 16 bytes, slower
// forms run.
struct FpropArguments {
  Dtype dtype;
  Shape shape;
  Pixels x;
  const void* weight;  // [K, C]
  const float* bn;     // [4, K]; null: out is raw and its statistics are written
  Pixels residual;     // [N, Ho, Wo, K] or none
  bool relu;
  Pixels out;          // [N, Ho, Wo, K]
  float *count, *mean, *m2;  // [partials], [partials, K], [partials, K]; null where bn is given
};
struct GramArguments {
  Dtype dtype;
  Shape shape;
  Pixels x;
  float *gram, *total;  // [C, C], [C]
  float* workspace;     // gram_workspace() floats
};
struct WgradArguments {
  Dtype dtype;
  Shape shape;
  Pixels g, x, out;  // g and out [N, Ho, Wo, K]; out none: g is not masked
  float *p, *sum;    // [K, C], [K]; sum may be null
  float* workspace;  // wgrad_workspace() floats
};
struct DgradArguments {
  Dtype dtype;
  Shape shape;
  Pixels dx, g, x, out;  // out as in WgradArguments
  const void *u, *v;     // [K, C], [C, C]; v may be null
  const float* k;        // [C] or null
  const float* v_scale;  // one number on the device by which x_s v is multiplied, or null for 1
  const float* d;        // [C], by which x_s is multiplied and added, or null
  bool relu;             // mask dx by x > 0
};

// cuda/*.cu: mma.sync, compute capability 8.0 and newer. cuda/hopper_*.cu: TMA and wgmma, 9.0 alone; what that path has
// no form for (raw output with statistics, masked g, channels that are no multiples of 8, unaligned memory) it hands to
// the portable one.
// Functions return null, or what went wrong in words. `stream` is a cudaStream_t.
namespace portable {
int64_t fprop_partials(const Shape&);
int64_t gram_workspace(const Shape&);
int64_t wgrad_workspace(const Shape&);
const char* fprop(const FpropArguments&, void* stream);
const char* gram(const GramArguments&, void* stream);
const char* wgrad(const WgradArguments&, void* stream);
const char* dgrad(const DgradArguments&, void* stream);
}  // namespace portable
namespace hopper {
int64_t gram_workspace(const Shape&);
int64_t wgrad_workspace(const Shape&);
const char* fprop(const FpropArguments&, void* stream);
const char* gram(const GramArguments&, void* stream);
const char* wgrad(const WgradArguments&, void* stream);
const char* dgrad(const DgradArguments&, void* stream);
}  // namespace hopper

}  // namespace fastres
