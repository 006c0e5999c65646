// projection_dgrad: dx += g u + x_s v + d*x_s + k at the pixels that the projection reads, and nothing elsewhere.
#include "row_products.cuh"

namespace fastres::portable {
namespace {

template <class T, int columns, bool masked, bool vectors>
const char* run(const DgradArguments& a, void* stream) {
  const Shape& s = a.shape;
  RowParameters<T> p{};
  const Rows x_rows = rows_of(a.x, s, s.stride);
  if (a.v) p.first = {static_cast<const T*>(a.x.data), x_rows, static_cast<const T*>(a.v), static_cast<uint32_t>(s.c)};
  p.first_scale = a.v_scale;
  p.second = {static_cast<const T*>(a.g.data), rows_of(a.g, s, 1), static_cast<const T*>(a.u),
              static_cast<uint32_t>(s.k)};
  p.mask = static_cast<const T*>(a.out.data), p.mask_rows = rows_of(a.out, s, 1);
  p.shift = a.k;
  p.out = static_cast<T*>(a.dx.data), p.out_rows = rows_of(a.dx, s, s.stride);
  p.addend = p.out, p.addend_rows = p.out_rows;
  p.relu = a.relu, p.slope = a.d;
  if (a.relu || a.d) p.input = static_cast<const T*>(a.x.data), p.input_rows = x_rows;
  p.m = static_cast<uint32_t>(s.rows()), p.n = static_cast<uint32_t>(s.c);
  return row_products<RowConfig<T, columns, Output::add, masked, vectors>>(p, stream);
}

template <class T>
const char* choose(const DgradArguments& a, void* stream) {
  const bool vectors = a.shape.c % 8 == 0 && a.shape.k % 8 == 0 && aligned(a.dx) && aligned(a.g) && aligned(a.x) &&
                       aligned(a.out) && aligned(a.u) && aligned(a.v) && aligned(a.k) && aligned(a.d);
  if (!vectors) return run<T, 64, true, false>(a, stream);
  if (a.shape.c <= 64) return a.out.data ? run<T, 64, true, true>(a, stream) : run<T, 64, false, true>(a, stream);
  return a.out.data ? run<T, 128, true, true>(a, stream) : run<T, 128, false, true>(a, stream);
}

}  // namespace

const char* dgrad(const DgradArguments& a, void* stream) {
  return a.dtype == Dtype::bfloat16 ? choose<bfloat16>(a, stream) : choose<float16>(a, stream);
}

}  // namespace fastres::portable
