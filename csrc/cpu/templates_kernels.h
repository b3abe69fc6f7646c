#pragma once

#include <cstdint>

#include "../common/macros.h"
#include "storage.h"
#include "units.h"

// The loops of the template family, compiled once for each instruction set (templates_kernels.cpp).
namespace picnn_fast {

// All templates of a map's size, laid out so that whoever goes along the positions of a map, or
// along the peaks of templates, reads on in memory, yet far smaller than templates times positions.
//
// Entry (i, j; a, b) is the value at offset (a - i, b - j) or, turned, (i - a, j - b): with (i, j)
// a peak, the template at position (a, b); turned, with (i, j) a position, its value in the
// template of peak (a, b). It is at
//   values[segment * per_segment + first + i * row + j * column + (a, b) in the segment]
// where the h·w pairs (a, b) in row-major order are cut into segments of `length`.
struct PanelLayout {
  int64_t height, width;
  int64_t segments, length;
  int64_t per_segment, first, row, column;
  int64_t size;

  // Where the entries of the number `at`-th pair (i, j) begin.
  PICNN_FAST_HD int64_t begin(int64_t at) const {
    const auto number = static_cast<uint32_t>(at), columns = static_cast<uint32_t>(width);
    return first + number / columns * row + number % columns * column;
  }
};

// Filters that lie side by side in memory: what the kernels keep of each is on their stack.
constexpr int64_t kFiltersAtOnce = 1024;

// Everything one call needs. A is the accumulation type: double for double maps, else float.
struct TemplateMask {
  MapsShape shape;
  Units units;
  const void* maps;
  Strides maps_strides;
  bool find_peak;    // or take it as given
  int64_t* peak;     // [B, N] contiguous, in [0, positions)
  const void* part;  // Template<A>
  double scale;
  int64_t width;
  bool side_by_side;   // filters, of which a unit then has at most kFiltersAtOnce
  PanelLayout layout;  // what follows is for other maps
  const void* masks;   // A panels of what to multiply by
  void* out;
  Strides out_strides;
  bool stream;  // write past the caches
};

struct TemplatesKernels {
  // Units [begin, end).
  void (*mask)(const TemplateMask&, Storage, int64_t begin, int64_t end);
};

extern const TemplatesKernels templates_kernels_default;
#ifdef __x86_64__
extern const TemplatesKernels templates_kernels_avx2;
extern const TemplatesKernels templates_kernels_avx512;
#endif

}  // namespace picnn_fast
