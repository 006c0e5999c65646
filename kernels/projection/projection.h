// The projection kernels' interface: raw pointers and sizes, no torch header, so that kernels compile without torch.
#pragma once

#include <cstdint>

namespace fastres {

enum class Dtype { float32, float64, bfloat16 };

// x is dense [N, H, W, C]. x_s = x[:, ::stride, ::stride] is read as a matrix of rows() rows of C elements.
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
// __init__.py as "acc" are float64 for float64, else float32; the others have the dtype given. v and k may be null.
struct CpuKernels {
  void (*gram)(Dtype, const Shape&, const void* x, void* gram, void* total, void* pivot, ParallelFor);
  void (*fprop)(Dtype, const Shape&, const void* x, const void* weight, const void* bn, void* out, ParallelFor);
  void (*wgrad)(Dtype, const Shape&, const void* g, const void* x, void* p, ParallelFor);
  void (*dgrad)(Dtype, const Shape&, void* dx, const void* g, const void* x, const void* u, const void* v,
                const void* k, ParallelFor);
};

// projection_cpu.cpp, compiled once per instruction set (CMakeLists.txt)
namespace baseline { extern const CpuKernels kernels; }
namespace avx2 { extern const CpuKernels kernels; }
namespace avx512 { extern const CpuKernels kernels; }

}  // namespace fastres
