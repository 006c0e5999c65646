// projection_fprop and projection_conv: out = x_s weight^T, through a batch norm known beforehand, or raw with
// statistics.
#include "row_products.cuh"

namespace fastres::portable {
namespace {

template <class T, int columns, Output output, bool vectors>
const char* run(const FpropArguments& a, void* stream) {
  const Shape& s = a.shape;
  RowParameters<T> p{};
  p.second = {static_cast<const T*>(a.x.data), rows_of(a.x, s, s.stride), static_cast<const T*>(a.weight),
              static_cast<uint32_t>(s.c)};
  p.m = static_cast<uint32_t>(s.rows()), p.n = static_cast<uint32_t>(s.k);
  p.out = static_cast<T*>(a.out.data), p.out_rows = rows_of(a.out, s, 1);
  if constexpr (output == Output::bn) {
    p.scale = a.bn + 2 * s.k, p.shift = a.bn + 3 * s.k;
    p.addend = static_cast<const T*>(a.residual.data), p.addend_rows = rows_of(a.residual, s, 1);
    p.relu = a.relu;
  } else {
    p.count = a.count, p.mean = a.mean, p.m2 = a.m2;
  }
  return row_products<RowConfig<T, columns, output, false, vectors>>(p, stream);
}

template <class T, Output output>
const char* choose(const FpropArguments& a, void* stream) {
  const bool vectors = a.shape.c % 8 == 0 && a.shape.k % 8 == 0 && aligned(a.x) && aligned(a.weight) &&
                       aligned(a.out) && aligned(a.residual) && aligned(a.bn);
  if (!vectors) return run<T, 64, output, false>(a, stream);
  return a.shape.k <= 64 ? run<T, 64, output, true>(a, stream) : run<T, 128, output, true>(a, stream);
}

template <class T>
const char* choose(const FpropArguments& a, void* stream) {
  return a.bn ? choose<T, Output::bn>(a, stream) : choose<T, Output::raw>(a, stream);
}

}  // namespace

int64_t fprop_partials(const Shape& s) { return divide_up(s.rows(), 128); }

const char* fprop(const FpropArguments& a, void* stream) {
  return a.dtype == Dtype::bfloat16 ? choose<bfloat16>(a, stream) : choose<float16>(a, stream);
}

}  // namespace fastres::portable
