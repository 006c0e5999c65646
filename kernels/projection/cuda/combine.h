// Adds up the partial sums of a matrix product whose depth was split.
#pragma once

#include <cstdint>

namespace fastres {

// parts [splits, rows, columns] become result [rows, columns], and sums [splits, rows] total [rows], where not null.
// symmetric: of parts only the 64x64 blocks on and above the diagonal are read, and result is exactly symmetric. The
// order of the additions depends on the number of splits alone. Without splits everything is 0.
struct Partials {
  const float *parts, *sums;
  float *result, *total;
  int64_t splits, rows, columns;
  bool symmetric;
};

// Null, or what went wrong.
const char* combine(const Partials& p, void* stream);

}  // namespace fastres
