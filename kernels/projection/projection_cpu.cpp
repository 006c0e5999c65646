// The strided 1x1 projection on CPUs: Gram, fprop, wgrad and dgrad as two register-blocked matrix products.
//
//   row products     D[m, n] = sum_k A[m, k] B[k, n]   fprop (A = x_s, B = weight^T), dgrad (A = [g | x_s], B = [u; v])
//   column products  D[i, j] = sum_m A[m, i] B[m, j]   wgrad (A = g, B = x_s), Gram (A = B = x_s - pivot)
//
// Both pack their operands into panels, [depth][tile_rows] and [depth][tile_columns], in the accumulation type; the
// strided pixels are gathered, g masked, bfloat16 widened and the pivot subtracted. One micro-kernel then holds a
// tile_rows x tile_columns tile in registers over the whole depth.
//
// The file is compiled once per instruction set, FASTRES_ISA naming the namespace. Everything but the table is in an
// unnamed namespace and no standard template is instantiated: the linker would merge weak symbols of the three builds,
// and an older processor could meet AVX-512 code.
//
// Every sum is split by shape alone, never by the number of threads: results have the same bits for any thread count.

#include "projection.h"

#include <cstring>
#include <new>

namespace fastres::FASTRES_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, tile_rows = 12;  // 24 of 32 registers hold the tile
#elif defined(__AVX2__)
constexpr int vector_bytes = 32, tile_rows = 6;  // 12 of 16
#elif defined(__aarch64__)
constexpr int vector_bytes = 16, tile_rows = 12;  // 24 of 32
#else
constexpr int vector_bytes = 16, tile_rows = 6;  // 12 of 16
#endif
constexpr int tile_vectors = 2;
template <class A>
constexpr int tile_columns = tile_vectors * vector_bytes / static_cast<int>(sizeof(A));

constexpr int64_t block = 96;                // of a column product; a multiple of every tile_rows and tile_columns
constexpr int64_t wide_block = 3 * block;    // wgrad's columns per task: packing g once serves 288 channels of x
constexpr int64_t slice = 256;               // rows summed in registers before they are added to memory
constexpr int64_t packed_bytes = 512 << 10;  // packed rows of one task, to stay in a second-level cache

struct bfloat16 {
  uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = T;
};
template <>
struct Accumulator<bfloat16> {
  using type = float;
};
template <class T>
using accumulator = typename Accumulator<T>::type;

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void narrow(float value, float& result) { result = value; }
inline void narrow(double value, double& result) { result = value; }
inline void narrow(float value, bfloat16& result) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  result.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

// value where a ReLU lets z, its input or output, pass, else 0. NaN passes.
template <class A, class Z>
inline A masked(A value, Z z) {
  return widen(z) <= 0 ? A(0) : value;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
  // The index-th piece of `size` of [0, limit).
  static Range piece(int64_t index, int64_t size, int64_t limit) {
    return {index * size, smaller((index + 1) * size, limit)};
  }
  int64_t size() const { return end - begin; }
};

template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<A*>(::operator new(size * sizeof(A), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator A*() const { return data_; }

 private:
  A* data_;
};

template <class F>
void in_parallel(ParallelFor parallel_for, int64_t tasks, const F& body) {
  auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); };
  if (tasks > 0) parallel_for(tasks, call, const_cast<F*>(&body));
}

// A matrix whose rows are pixels: the strided ones of [N, H, W, C], or all of [N, Ho, Wo, K], which may have a mask of
// the same sizes, not null then.
template <class T>
struct Matrix {
  const T *data, *mask;
  int64_t channels, h, w, stride, out_h, out_w;

  static Matrix strided(const void* x, const Shape& s) {
    return {static_cast<const T*>(x), nullptr, s.c, s.h, s.w, s.stride, s.out_h(), s.out_w()};
  }
  static Matrix dense(const void* g, const void* out, const Shape& s) {
    return {static_cast<const T*>(g), static_cast<const T*>(out), s.k, s.out_h(), s.out_w(), 1, s.out_h(), s.out_w()};
  }
  // Pointers to `count` consecutive rows from row `first` on.
  void rows(int64_t first, int64_t count, const T** pointers) const {
    int64_t j = first % out_w, i = first / out_w % out_h, n = first / out_w / out_h;
    for (int64_t row = 0; row < count; ++row) {
      pointers[row] = data + ((n * h + i * stride) * w + j * stride) * channels;
      if (++j == out_w) {
        j = 0;
        if (++i == out_h) i = 0, ++n;
      }
    }
  }
  // Pointers to the mask's rows beside those that rows() gave, or null where there is none.
  const T* const* masks(const T* const* rows, int64_t count, const T** pointers) const {
    for (int64_t row = 0; mask && row < count; ++row) pointers[row] = mask + (rows[row] - data);
    return mask ? pointers : nullptr;
  }
};

// panel[depth][width] from `count` rows of `depth` elements, masked where masks is not null; rows past count are zero.
// Sixteen elements of a row at a time: rows a power of two apart share cache sets, and a line must be used up before
// the next row evicts it.
template <int width, class T, class A>
void pack_rows(const T* const* rows, const T* const* masks, int64_t count, int64_t depth, A* __restrict panel) {
  for (int64_t k0 = 0; k0 < depth; k0 += 16) {
    int64_t k1 = smaller(k0 + 16, depth);
    for (int64_t row = 0; row < width; ++row) {
      if (row < count) {
        const T* source = rows[row];
        if (masks) {
          for (int64_t k = k0; k < k1; ++k) panel[k * width + row] = masked(widen(source[k]), masks[row][k]);
        } else {
          for (int64_t k = k0; k < k1; ++k) panel[k * width + row] = widen(source[k]);
        }
      } else {
        for (int64_t k = k0; k < k1; ++k) panel[k * width + row] = 0;
      }
    }
  }
}

// Panels [depth][width], `stride` elements apart, from some columns of `depth` rows, masked where masks is not null,
// less shift[column] where shift is not null; columns beyond the range are zero. Eight rows at a time, for the reason
// given at pack_rows.
template <int width, class T, class A>
void pack_columns(const T* const* rows, const T* const* masks, int64_t depth, Range columns, const A* shift,
                  A* __restrict panels, int64_t stride) {
  for (int64_t k0 = 0; k0 < depth; k0 += 8) {
    int64_t k1 = smaller(k0 + 8, depth);
    A* panel = panels;
    for (int64_t column = columns.begin; column < columns.end; column += width, panel += stride) {
      int64_t count = columns.end - column;
      A offset[width];
      for (int i = 0; i < width; ++i) offset[i] = shift && i < count ? shift[column + i] : A(0);
      for (int64_t k = k0; k < k1; ++k) {
        const T* source = rows[k] + column;
        A* target = panel + k * width;
        if (masks) {
          const T* mask = masks[k] + column;
          int some = static_cast<int>(smaller(count, width));
          for (int i = 0; i < some; ++i) target[i] = masked(widen(source[i]), mask[i]) - offset[i];
          for (int i = some; i < width; ++i) target[i] = 0;
        } else if (count >= width) {
          for (int i = 0; i < width; ++i) target[i] = widen(source[i]) - offset[i];
        } else {
          for (int i = 0; i < width; ++i) target[i] = i < count ? widen(source[i]) - offset[i] : A(0);
        }
      }
    }
  }
}

// tile[tile_rows][tile_columns] = a^T b over `depth`, for packed panels a and b.
template <class A>
inline void multiply(const A* a, const A* b, int64_t depth, A* __restrict tile) {
  typedef A Vector __attribute__((vector_size(vector_bytes), may_alias));
  constexpr int lanes = vector_bytes / sizeof(A);
  Vector sum[tile_rows][tile_vectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += tile_rows, b += tile_columns<A>) {
    Vector right[tile_vectors];
#pragma GCC unroll 2
    for (int v = 0; v < tile_vectors; ++v) right[v] = *reinterpret_cast<const Vector*>(b + v * lanes);
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < tile_vectors; ++v) sum[i][v] += a[i] * right[v];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < tile_vectors; ++v)
      *reinterpret_cast<Vector*>(tile + i * tile_columns<A> + v * lanes) = sum[i][v];
  }
}

// Row products: result(first_row, rows, first_column, columns, tile) for every tile of [a0 | a1] b. a1 may be null; b
// is packed in panels of tile_columns, its depth the channels of a0 and a1 together.
template <class T, class A, class Result>
void row_products(const Matrix<T>& a0, const Matrix<T>* a1, int64_t rows, const A* b, int64_t columns,
                  ParallelFor parallel_for, const Result& result) {
  constexpr int width = tile_columns<A>;
  int64_t depth = a0.channels + (a1 ? a1->channels : 0);
  int64_t fit = packed_bytes / larger(1, depth * static_cast<int64_t>(sizeof(A)) * tile_rows);
  int64_t task_rows = tile_rows * smaller(larger(1, fit), block / tile_rows);
  int64_t row_tasks = divide_up(rows, task_rows), panels = divide_up(columns, width);
  int64_t task_panels = row_tasks < 32 ? smaller(panels, 8) : panels;  // few rows: share out the columns too
  int64_t column_tasks = divide_up(panels, larger(1, task_panels));
  in_parallel(parallel_for, row_tasks * column_tasks, [&](int64_t begin, int64_t end) {
    Buffer<A> packed(task_rows * depth);
    alignas(64) A tile[tile_rows * width];
    for (int64_t task = begin; task < end; ++task) {
      int64_t first = task / column_tasks * task_rows, count = smaller(task_rows, rows - first);
      for (int64_t row = 0; row < count; row += tile_rows) {
        const T *pointers[tile_rows], *masks[tile_rows];
        int64_t some = smaller(tile_rows, count - row);
        a0.rows(first + row, some, pointers);
        pack_rows<tile_rows>(pointers, a0.masks(pointers, some, masks), some, a0.channels, packed + row * depth);
        if (!a1) continue;
        a1->rows(first + row, some, pointers);
        pack_rows<tile_rows>(pointers, a1->masks(pointers, some, masks), some, a1->channels,
                             packed + row * depth + a0.channels * tile_rows);
      }
      int64_t first_panel = task % column_tasks * task_panels;
      for (int64_t panel = first_panel; panel < smaller(first_panel + task_panels, panels); ++panel) {
        for (int64_t row = 0; row < count; row += tile_rows) {
          multiply<A>(packed + row * depth, b + panel * depth * width, depth, tile);
          int64_t column = panel * width;
          result(first + row, smaller(tile_rows, count - row), column, smaller(width, columns - column), tile);
        }
      }
    }
  });
}

// How column products are shared out: blocks of the result times equal splits of the rows; about 64 tasks, but no split
// so short that adding the splits up would show.
struct Splits {
  int64_t all_rows, rows, count;
  Splits(int64_t all_rows, int64_t blocks) : all_rows(all_rows) {
    count = larger(1, smaller(64 / larger(1, blocks), all_rows / (2 * slice)));
    rows = divide_up(all_rows, count);
  }
  Range operator[](int64_t split) const { return Range::piece(split, rows, all_rows); }
};

// sums[i, j] of one block, over a range of rows, columns i of a and j of b; row i starts at sums + i * ld. With `upper`
// tiles below the diagonal are left 0. shift, where not null, is subtracted from both. totals, where not null, receives
// a's column sums.
template <class T, class A>
void column_block(const Matrix<T>& a, const Matrix<T>& b, Range rows, Range i, Range j, bool upper, const A* shift,
                  A* sums, int64_t ld, A* totals, A* packed_a, A* packed_b) {
  constexpr int width = tile_columns<A>;
  const T *pointers[slice], *masks[slice];
  alignas(64) A tile[tile_rows * width];
  for (int64_t row = i.begin; row < i.end; ++row) {
    for (int64_t column = j.begin; column < j.end; ++column) sums[row * ld + column] = 0;
    if (totals) totals[row] = 0;
  }
  int64_t step = divide_up(rows.size(), larger(1, divide_up(rows.size(), slice)));
  for (int64_t first = rows.begin; first < rows.end; first += step) {
    int64_t depth = smaller(step, rows.end - first);
    a.rows(first, depth, pointers);
    pack_columns<tile_rows>(pointers, a.masks(pointers, depth, masks), depth, i, shift, packed_a, tile_rows * slice);
    b.rows(first, depth, pointers);
    pack_columns<width>(pointers, b.masks(pointers, depth, masks), depth, j, shift, packed_b, width * slice);
    for (int64_t row = i.begin; totals && row < i.end; row += tile_rows) {
      const A* panel = packed_a + (row - i.begin) * slice;
      A sum[tile_rows] = {};
      // In groups: fewer roundings than one after the other, as many as the library's sums of several at a time.
      for (int64_t k = 0, end; k < depth; k = end) {
        A group[tile_rows] = {};
        for (end = smaller(k + 16, depth); k < end; ++k) {
          for (int r = 0; r < tile_rows; ++r) group[r] += panel[k * tile_rows + r];
        }
        for (int r = 0; r < tile_rows; ++r) sum[r] += group[r];
      }
      for (int64_t r = 0; r < smaller(tile_rows, i.end - row); ++r) totals[row + r] += sum[r];
    }
    for (int64_t column = j.begin; column < j.end; column += width) {
      const A* panel = packed_b + (column - j.begin) * slice;
      int64_t columns = smaller(width, j.end - column);
      for (int64_t row = i.begin; row < i.end; row += tile_rows) {
        if (upper && column + width <= row) continue;
        multiply<A>(packed_a + (row - i.begin) * slice, panel, depth, tile);
        for (int64_t r = 0; r < smaller(tile_rows, i.end - row); ++r) {
          A* out = sums + (row + r) * ld + column;
          for (int64_t c = 0; c < columns; ++c) out[c] += tile[r * width + c];
        }
      }
    }
  }
}

// result[i] = sum of parts[split][i], in the order of the splits.
template <class A>
void combine(const A* parts, int64_t splits, int64_t size, A* result, ParallelFor parallel_for) {
  constexpr int64_t piece = 4096;
  in_parallel(parallel_for, divide_up(size, piece), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * piece; i < smaller(end * piece, size); ++i) {
      A sum = 0;
      for (int64_t split = 0; split < splits; ++split) sum += parts[split * size + i];
      result[i] = sum;
    }
  });
}

template <class T>
void gram(const Shape& s, const void* x, void* gram_out, void* total_out, void* pivot_out, ParallelFor parallel_for) {
  using A = accumulator<T>;
  A *gram = static_cast<A*>(gram_out), *total = static_cast<A*>(total_out), *pivot = static_cast<A*>(pivot_out);
  auto pixels = Matrix<T>::strided(x, s);
  int64_t rows = s.rows(), c = s.c;
  const T* leading[64];
  int64_t count = smaller(64, rows);
  pixels.rows(0, count, leading);
  for (int64_t i = 0; i < c; ++i) {
    double sum = 0;
    for (int64_t row = 0; row < count; ++row) sum += widen(leading[row][i]);
    pivot[i] = static_cast<A>(count ? sum / static_cast<double>(count) : 0);
  }
  int64_t blocks = divide_up(c, block), pairs = blocks * (blocks + 1) / 2;
  Splits splits(rows, pairs);
  Buffer<A> parts(splits.count > 1 ? splits.count * c * c : 0), totals(splits.count * c);
  in_parallel(parallel_for, splits.count * pairs, [&](int64_t begin, int64_t end) {
    Buffer<A> packed_a(slice * block), packed_b(slice * block);
    for (int64_t task = begin; task < end; ++task) {
      int64_t split = task / pairs, i = 0, j = task % pairs;
      while (j >= blocks - i) j -= blocks - i, ++i;  // pairs with j >= i, row by row
      j += i;
      column_block<T, A>(pixels, pixels, splits[split], Range::piece(i, block, c), Range::piece(j, block, c), i == j,
                         pivot, splits.count > 1 ? parts + split * c * c : gram, c,
                         i == j ? totals + split * c : nullptr, packed_a, packed_b);
    }
  });
  if (splits.count > 1) combine<A>(parts, splits.count, c * c, gram, parallel_for);
  combine<A>(totals, splits.count, c, total, parallel_for);
  in_parallel(parallel_for, blocks, [&](int64_t begin, int64_t end) {  // mirror block by block, to stay in cache
    for (int64_t i0 = begin * block; i0 < smaller(end * block, c); i0 += block) {
      for (int64_t j0 = 0; j0 <= i0; j0 += block) {
        for (int64_t i = i0; i < smaller(i0 + block, c); ++i) {
          for (int64_t j = j0; j < smaller(j0 + block, i); ++j) gram[i * c + j] = gram[j * c + i];
        }
      }
    }
  });
}

template <class T>
void fprop(const Shape& s, const void* x, const void* weight, const void* bn, const void* residual, bool relu,
           void* out_, ParallelFor parallel_for) {
  using A = accumulator<T>;
  constexpr int width = tile_columns<A>;
  const T *w = static_cast<const T*>(weight), *added = static_cast<const T*>(residual);
  T* out = static_cast<T*>(out_);
  const A *scale = static_cast<const A*>(bn) + 2 * s.k, *shift = scale + s.k;
  Buffer<A> packed(divide_up(s.k, width) * width * s.c);
  in_parallel(parallel_for, divide_up(s.k, width), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const T* rows[width];
      int64_t count = smaller(width, s.k - panel * width);
      for (int64_t i = 0; i < count; ++i) rows[i] = w + (panel * width + i) * s.c;
      pack_rows<width>(rows, static_cast<const T* const*>(nullptr), count, s.c, packed + panel * width * s.c);
    }
  });
  row_products<T, A>(Matrix<T>::strided(x, s), nullptr, s.rows(), packed, s.k, parallel_for,
                     [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const A* tile) {
                       for (int64_t r = 0; r < rows; ++r) {
                         A values[width];
                         for (int64_t c = 0; c < columns; ++c)
                           values[c] = scale[column + c] * tile[r * width + c] + shift[column + c];
                         int64_t first = (row + r) * s.k + column;
                         for (int64_t c = 0; added && c < columns; ++c) values[c] += widen(added[first + c]);
                         for (int64_t c = 0; relu && c < columns; ++c) values[c] = masked(values[c], values[c]);
                         for (int64_t c = 0; c < columns; ++c) narrow(values[c], out[first + c]);
                       }
                     });
}

template <class T>
void wgrad(const Shape& s, const void* g, const void* x, const void* out, void* p_, void* sum_,
           ParallelFor parallel_for) {
  using A = accumulator<T>;
  A *p = static_cast<A*>(p_), *sum = static_cast<A*>(sum_);
  auto a = Matrix<T>::dense(g, out, s), b = Matrix<T>::strided(x, s);
  // Sums come with the first columns of x; without channels there are none, and g is multiplied by nothing.
  int64_t down = divide_up(s.k, block), across = larger(1, divide_up(s.c, wide_block)), size = s.k * s.c;
  Splits splits(s.rows(), down * across);
  Buffer<A> parts(splits.count > 1 ? splits.count * size : 0), sums(sum ? splits.count * s.k : 0);
  in_parallel(parallel_for, splits.count * down * across, [&](int64_t begin, int64_t end) {
    Buffer<A> packed_a(slice * block), packed_b(slice * wide_block);
    for (int64_t task = begin; task < end; ++task) {
      int64_t split = task / (down * across);
      Range i = Range::piece(task / across % down, block, s.k), j = Range::piece(task % across, wide_block, s.c);
      column_block<T, A>(a, b, splits[split], i, j, false, nullptr, splits.count > 1 ? parts + split * size : p, s.c,
                         sum && j.begin == 0 ? sums + split * s.k : nullptr, packed_a, packed_b);
    }
  });
  if (splits.count > 1) combine<A>(parts, splits.count, size, p, parallel_for);
  if (sum) combine<A>(sums, splits.count, s.k, sum, parallel_for);
}

template <class T>
void dgrad(const Shape& s, void* dx_, const void* g, const void* x, const void* u, const void* v, const void* k,
           const void* d, const void* out, bool relu, ParallelFor parallel_for) {
  using A = accumulator<T>;
  constexpr int width = tile_columns<A>;
  const A *bias = static_cast<const A*>(k), *slope = static_cast<const A*>(d);
  auto from = Matrix<T>::strided(x, s), to = Matrix<T>::strided(dx_, s);
  int64_t depth = s.k + (v ? s.c : 0);
  Buffer<A> packed(divide_up(s.c, width) * width * depth);
  in_parallel(parallel_for, divide_up(s.c, width), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t first = 0; first < depth; first += slice) {
        const T* rows[slice];
        int64_t count = smaller(slice, depth - first);
        for (int64_t i = 0; i < count; ++i) {
          int64_t row = first + i;
          rows[i] = row < s.k ? static_cast<const T*>(u) + row * s.c : static_cast<const T*>(v) + (row - s.k) * s.c;
        }
        pack_columns<width, T, A>(rows, nullptr, count, Range::piece(panel, width, s.c), nullptr,
                                  packed + (panel * depth + first) * width, 0);
      }
    }
  });
  row_products<T, A>(Matrix<T>::dense(g, out, s), v ? &from : nullptr, s.rows(), packed, s.c, parallel_for,
                     [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const A* tile) {
                       const T *pointers[tile_rows], *inputs[tile_rows];
                       to.rows(row, rows, pointers);
                       if (relu || slope) from.rows(row, rows, inputs);
                       for (int64_t r = 0; r < rows; ++r) {
                         T* pixel = const_cast<T*>(pointers[r]) + column;
                         A values[width];
                         for (int64_t c = 0; c < columns; ++c) {
                           A sum = tile[r * width + c] + (bias ? bias[column + c] : A(0));
                           values[c] = widen(pixel[c]) + sum;
                         }
                         for (int64_t c = 0; slope && c < columns; ++c)
                           values[c] += slope[column + c] * widen(inputs[r][column + c]);
                         for (int64_t c = 0; relu && c < columns; ++c)
                           values[c] = masked(values[c], inputs[r][column + c]);
                         for (int64_t c = 0; c < columns; ++c) narrow(values[c], pixel[c]);
                       }
                     });
}

#define FASTRES_BY_DTYPE(name)                                          \
  [](Dtype dtype, const Shape& shape, auto... arguments) {              \
    switch (dtype) {                                                    \
      case Dtype::float32: return name<float>(shape, arguments...);     \
      case Dtype::float64: return name<double>(shape, arguments...);    \
      case Dtype::bfloat16: return name<bfloat16>(shape, arguments...); \
      case Dtype::float16: return; /* arguments.h refuses it */         \
    }                                                                   \
  }

}  // namespace

const CpuKernels kernels = {FASTRES_BY_DTYPE(gram), FASTRES_BY_DTYPE(fprop), FASTRES_BY_DTYPE(wgrad),
                            FASTRES_BY_DTYPE(dgrad)};

}  // namespace fastres::FASTRES_ISA
