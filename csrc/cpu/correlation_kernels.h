#pragma once

#include <cstdint>

#include "../common/macros.h"
#include "storage.h"
#include "units.h"

// The loops of the correlation family, compiled once for each instruction set
// (correlation_kernels.cpp). A unit of work is an image.
namespace picnn_fast {

// Everything one call needs. A is the accumulation type: double for double maps, else float.
struct Correlation {
  MapsShape shape;
  const void* maps;
  Strides maps_strides;
  const void* mean;  // A [C, P]
  // A [P, C] where filters are neighbours in memory, else null.
  const void* mean_by_position;
  const int64_t* groups;  // [C], in [0, num_groups)
  int64_t num_groups;
  const bool* positive;  // [B], or null: all images count
  void* norms;           // A [B, C]: written in the forward pass, read in the backward pass
  void* sums;            // A [B, num_groups, P], likewise
  double* moments;       // forward: [B, 2, num_groups], ‖S‖² and ⟨S, Σ S⟩ of each image and group
  const void* own;       // backward: A [num_groups], see GroupGradient
  const void* total;
  void* grad;
  Strides grad_strides;
  bool stream;  // write the gradient past the caches
};

constexpr int64_t kTile = 8;  // maps worked on together: as many as the first-level cache takes

// A row of numbers of a map, with zeros up to whole vectors.
PICNN_FAST_HD int64_t padded_positions(int64_t positions) { return (positions + 15) / 16 * 16; }

// Numbers at a position, one a group, with zeros up to two whole vectors.
inline int64_t table_width(int64_t num_groups) { return (num_groups + 31) / 32 * 32; }

// Numbers of type A that a thread needs to work in: a tile of maps or a table for each position, a
// row for each group, two more.
inline int64_t correlation_scratch(const Correlation& c) {
  const int64_t padded = padded_positions(c.shape.positions);
  const int64_t tables = c.shape.positions * table_width(c.num_groups);
  const int64_t tile = kTile * padded;
  return (tile < tables ? tables : tile) + (c.num_groups + 2) * padded;
}

struct CorrelationKernels {
  // Images [begin, end); scratch is aligned to 64 bytes.
  void (*forward)(const Correlation&, Storage, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const Correlation&, Storage, int64_t begin, int64_t end, void* scratch);
};

extern const CorrelationKernels correlation_kernels_default;
#ifdef __x86_64__
extern const CorrelationKernels correlation_kernels_avx2;
extern const CorrelationKernels correlation_kernels_avx512;
#endif

}  // namespace picnn_fast
