#pragma once

// Products of rows with all templates, a warp's share of them. Templates are looked up in their
// values at each offset. Float products run on the matrix units, three for each as matrix_units.h
// has it (two where the maps have 16 bits), since exp(s) would magnify the rounding of one; those
// of float64, and of infinities, NaN and what may overflow, do not.

#include <type_traits>

#include "../common/templates.h"
#include "launch.h"
#include "matrix_units.h"

namespace picnn_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStrip = 32;     // rows of a warp's product
constexpr int kUnit = 8;       // columns and depth of one step of it
constexpr int kMostTiles = 8;  // of kUnit columns: 64 sums a thread
// Beyond a multiple of 32: the lanes of a step then read different banks.
constexpr int kPad = 4;

// A value of a template, as products take it.
template <typename A>
struct Entry {
  A whole;
  __device__ static Entry of(A x) { return {x}; }
  __device__ A value() const { return whole; }
};
template <>
struct Entry<float> {
  Split parts;
  __device__ static Entry of(float x) {
    Entry entry;  // nvcc 13.0 breaks down over an expression here
    entry.parts = splits(x) ? split(x) : Split{x, 0};
    return entry;
  }
  __device__ float value() const { return parts.high + parts.low; }
};

// The number of a position, or of the last one where there is none: lanes look there all the same.
__device__ inline int number_on_map(const Offsets& offsets, int position) {
  return offsets.number(min(position, offsets.positions() - 1));
}

// What a warp needs for kStrip rows of a product with the templates.
template <typename A>
struct Product {
  const A* matrix;
  int row[4];              // where this lane's begin: g, g + 8, g + 16, g + 24, g = lane / 4
  const int* number;       // of the offset of each position (or template) that is summed over
  int count;               // of them; rows and numbers go on to a multiple of kUnit, rows with 0
  const Entry<A>* middle;  // the values of offsets, from number 0
  Offsets offsets;
  int first, tiles;  // columns: kUnit * tiles from the first

  // Rows below `rows`, from `strip` on, of a matrix.
  __device__ void set_rows(const A* matrix_, int stride, int strip, int rows) {
    matrix = matrix_;
    for (int q = 0; q < 4; ++q) row[q] = min(strip + kUnit * q + lane() / 4, rows - 1) * stride;
  }
  __device__ static int lane() { return threadIdx.x % 32; }
  // Where this lane's element e of a 16 x 8 tile of the product belongs: see matrix_units.h.
  __device__ static int row_of(int half, int e) { return 16 * half + lane() / 4 + e / 2 * 8; }
  __device__ int column_of(int tile, int e) const {
    return first + kUnit * tile + lane() % 4 * 2 + e % 2;
  }
};

// sum += rows · templates. kGradient: rows hold weights of templates and columns are positions,
// otherwise the reverse. kShort: rows hold 10-bit mantissas. `plain`: without the matrix units.
template <bool kGradient, bool kShort, int kTiles, typename A>
__device__ void multiply(const Product<A>& p, bool plain, A (&sum)[2][kTiles][4]) {
  const auto look_up = [&](int number, int column) {
    return p.middle[kGradient ? column - number : number - column];
  };
  if constexpr (std::is_same_v<A, float>) {
    if (!plain) {
      const int group = p.lane() / 4, place = p.lane() % 4;
      int column[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        column[j] = number_on_map(p.offsets, p.first + kUnit * j + group);
#pragma unroll 1
      for (int k = place; k < p.count + place; k += kUnit) {
        float high[2][4], low[2][4];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float value = p.matrix[p.row[e / 2] + k + e % 2 * 4];
          const Split x = kShort ? Split{value, 0} : split(value);
          high[e / 4][e / 2 % 2 + e % 2 * 2] = x.high;
          low[e / 4][e / 2 % 2 + e % 2 * 2] = x.low;
        }
        const int near = p.number[k], far = p.number[k + 4];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (j >= p.tiles) break;
          const Split a = look_up(near, column[j]).parts, b = look_up(far, column[j]).parts;
          const float t_high[2] = {a.high, b.high}, t_low[2] = {a.low, b.low};
          // The matrix units cut off what does not fit a sum, always towards 0. So the small
          // products come first, and sums of many steps are made outside, where they round.
          float part[2][4] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if constexpr (!kShort) multiply_tiles(part[half], low[half], t_high);
#pragma unroll
          for (int half = 0; half < 2; ++half) multiply_tiles(part[half], high[half], t_low);
#pragma unroll
          for (int half = 0; half < 2; ++half) multiply_tiles(part[half], high[half], t_high);
#pragma unroll
          for (int e = 0; e < 8; ++e) sum[e / 4][j][e % 4] += part[e / 4][e % 4];
        }
      }
      return;
    }
  }
  int column[kTiles][2];
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) column[j][c] = number_on_map(p.offsets, p.column_of(j, c));
#pragma unroll 1
  for (int k = 0; k < p.count; ++k) {
    const int number = p.number[k];
    A x[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) x[q] = p.matrix[p.row[q] + k];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j >= p.tiles) break;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const A t = look_up(number, column[j][c]).value();
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[q / 2][j][q % 2 * 2 + c] += x[q] * t;
      }
    }
  }
}

// Whether maps of type T have 10-bit mantissas or shorter ones.
template <typename T>
constexpr bool kShortMaps = sizeof(T) == 2;

// Whether the matrix units take x.
template <typename A>
__device__ bool fits_units(A x) {
  if constexpr (std::is_same_v<A, float>)
    return splits(x);
  else
    return true;
}

}  // namespace
}  // namespace picnn_fast
