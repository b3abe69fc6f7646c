#pragma once

#include <cstdint>
#include <vector>

#include "../common/templates.h"
#include "templates_kernels.h"

// Host code that lays out a template for the kernels.
namespace picnn_fast {

inline PanelLayout panel_layout(int64_t height, int64_t width) {
  // Short rows by themselves leave vectors half empty: worth larger panels, up to a few megabytes.
  constexpr int64_t kNarrow = 32, kMostIfNarrow = 1 << 20, kMost = 1 << 16;
  constexpr int64_t kPadding = 64;  // vectors may be read beyond the end of a segment
  PanelLayout layout{};
  layout.height = height;
  layout.width = width;
  const int64_t rows = 2 * height - 1;
  if (width * rows * width <= (width < kNarrow ? kMostIfNarrow : kMost)) {
    // For each j the rows of offsets, all of them, cut to their columns -j to width - 1 - j. So the
    // rows of a map follow one another, and short ones too fill vectors.
    layout.segments = 1;
    layout.length = height * width;
    layout.first = (height - 1) * width;
    layout.row = -width;
    layout.column = rows * width;
    layout.size = width * rows * width + kPadding;
  } else {
    const int64_t columns = 2 * width - 1;
    layout.segments = height;
    layout.length = width;
    layout.per_segment = columns;
    layout.first = (height - 1) * columns + width - 1;
    layout.row = -columns;
    layout.column = -1;
    layout.size = rows * columns + kPadding;
  }
  return layout;
}

// `value(di, dj)` of every offset, laid out so.
template <typename A, typename Value>
std::vector<A> panels(const PanelLayout& layout, const Value& value) {
  std::vector<A> values(static_cast<size_t>(layout.size));
  const auto height = static_cast<int32_t>(layout.height);
  const auto width = static_cast<int32_t>(layout.width);
  A* out = values.data();
  const bool whole_maps = layout.per_segment == 0;
  for (int32_t j = 0; j < (whole_maps ? width : 1); ++j) {
    const int32_t begin = whole_maps ? -j : 1 - width;
    for (int32_t di = 1 - height; di < height; ++di) {
      for (int32_t dj = begin; dj < width - j; ++dj) {
        *out++ = value(di, dj);
      }
    }
  }
  return values;
}

}  // namespace picnn_fast
