#pragma once

#include <cstdint>

#include "macros.h"

// Part templates, in units of tau. picnn_fast/reference/templates.py is the definition.
namespace picnn_fast {

// How far positions of maps are from a peak. Offsets are numbered in row-major order, so that the
// one of a position from a peak is the difference of their numbers, counted from the middle. Sides
// are at most 2^15: numbers of positions fit 31 bits.
struct Offsets {
  int32_t height, width;

  PICNN_FAST_HD int64_t rows() const { return 2 * int64_t{height} - 1; }
  PICNN_FAST_HD int64_t columns() const { return 2 * int64_t{width} - 1; }
  PICNN_FAST_HD int64_t count() const { return rows() * columns(); }
  PICNN_FAST_HD int64_t middle() const { return count() / 2; }
  PICNN_FAST_HD int32_t positions() const { return height * width; }
  PICNN_FAST_HD int32_t number(int32_t position) const {
    const auto at = static_cast<uint32_t>(position), across = static_cast<uint32_t>(width);
    return static_cast<int32_t>(at + at / across * (across - 1));
  }
};

// A template by its value at each offset from its peak. Sums and templates are of type A.
template <typename A>
struct Template {
  const A* values;  // [2 * height - 1, 2 * width - 1]
  Offsets offsets;
};

}  // namespace picnn_fast

namespace PICNN_FAST_NAMESPACE {

// What the mask layer multiplies by, for a value in units of tau.
template <typename A>
PICNN_FAST_HD A mask_value(A value, A scale) {
  return (value < A{0} ? A{0} : value) * scale;
}

}  // namespace PICNN_FAST_NAMESPACE
