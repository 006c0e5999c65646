// projection_wgrad: p = g^T x_s and the column sums of g, g masked by the ReLU of out.
#include "column_products.cuh"

namespace fastres::portable {
namespace {

template <class T, int columns, bool masked, bool vectors>
const char* run(const WgradArguments& a, void* stream) {
  const Shape& s = a.shape;
  ColumnParameters<T> p{};
  p.a = static_cast<const T*>(a.g.data), p.a_rows = rows_of(a.g, s, 1);
  p.b = static_cast<const T*>(a.x.data), p.b_rows = rows_of(a.x, s, s.stride);
  p.mask = static_cast<const T*>(a.out.data), p.mask_rows = rows_of(a.out, s, 1);
  p.m = static_cast<uint32_t>(s.rows()), p.i = static_cast<uint32_t>(s.k), p.j = static_cast<uint32_t>(s.c);
  p.parts = a.workspace;
  return column_products<ColumnConfig<T, 128, columns, false, masked, vectors>>(p, a.p, a.sum, stream);
}

template <class T>
const char* choose(const WgradArguments& a, void* stream) {
  const bool vectors = a.shape.c % 8 == 0 && a.shape.k % 8 == 0 && aligned(a.g) && aligned(a.x) && aligned(a.out) &&
                       aligned(a.workspace);
  const bool narrow = a.shape.c <= 64;
  if (!vectors) return narrow ? run<T, 64, true, false>(a, stream) : run<T, 128, true, false>(a, stream);
  if (narrow) return a.out.data ? run<T, 64, true, true>(a, stream) : run<T, 64, false, true>(a, stream);
  return a.out.data ? run<T, 128, true, true>(a, stream) : run<T, 128, false, true>(a, stream);
}

}  // namespace

int64_t wgrad_workspace(const Shape& s) {
  const int64_t tiles = divide_up(s.k, 128) * divide_up(s.c, s.c <= 64 ? 64 : 128);
  return splits_of(s.rows(), tiles, false) * s.k * (s.c + 1);
}

const char* wgrad(const WgradArguments& a, void* stream) {
  return a.dtype == Dtype::bfloat16 ? choose<bfloat16>(a, stream) : choose<float16>(a, stream);
}

}  // namespace fastres::portable
