// projection_gram: x_s^T x_s and the column sums of x_s.
#include "column_products.cuh"

namespace fastres::portable {
namespace {

template <class T, int side, bool vectors>
const char* run(const GramArguments& a, void* stream) {
  const Shape& s = a.shape;
  ColumnParameters<T> p{};
  p.a = p.b = static_cast<const T*>(a.x.data);
  p.a_rows = p.b_rows = rows_of(a.x, s, s.stride);
  p.m = static_cast<uint32_t>(s.rows()), p.i = p.j = static_cast<uint32_t>(s.c);
  p.parts = a.workspace;
  return column_products<ColumnConfig<T, side, side, true, false, vectors>>(p, a.gram, a.total, stream);
}

template <class T>
const char* choose(const GramArguments& a, void* stream) {
  const bool vectors = a.shape.c % 8 == 0 && aligned(a.x) && aligned(a.workspace);
  if (a.shape.c <= 64) return vectors ? run<T, 64, true>(a, stream) : run<T, 64, false>(a, stream);
  return vectors ? run<T, 128, true>(a, stream) : run<T, 128, false>(a, stream);
}

}  // namespace

int64_t gram_workspace(const Shape& s) {
  const int64_t blocks = divide_up(s.c, s.c <= 64 ? 64 : 128);
  return splits_of(s.rows(), blocks * (blocks + 1) / 2, true) * s.c * (s.c + 1);
}

const char* gram(const GramArguments& a, void* stream) {
  return a.dtype == Dtype::bfloat16 ? choose<bfloat16>(a, stream) : choose<float16>(a, stream);
}

}  // namespace fastres::portable
