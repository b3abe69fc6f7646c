#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/templates.h"
#include "templates_kernels.h"

// Host code that lays out a template for the kernels.
namespace picnn_fast {

inline PanelLayout panel_layout(const Offsets& offsets) {
  // Short rows by themselves leave vectors half empty: worth larger panels, up to a few megabytes.
  constexpr int64_t kNarrow = 32, kMostIfNarrow = 1 << 20, kMost = 1 << 16;
  constexpr int64_t kPadding = 64;  // vectors may be read beyond the end of a segment
  const int64_t height = offsets.height, width = offsets.width;
  const int64_t rows = offsets.rows(), columns = offsets.columns();
  PanelLayout layout{};
  layout.height = height;
  layout.width = width;
  layout.width_inverse = 1.0 / static_cast<double>(width);
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

// `values`, one an offset, laid out so.
template <typename A>
std::vector<A> panels(const PanelLayout& layout, const std::vector<A>& values) {
  std::vector<A> panels(static_cast<size_t>(layout.size));
  if (layout.per_segment != 0) {
    std::copy(values.begin(), values.end(), panels.begin());
    return panels;
  }
  const int64_t rows = 2 * layout.height - 1, columns = 2 * layout.width - 1;
  auto out = panels.begin();
  for (int64_t j = 0; j < layout.width; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t first = i * columns + layout.width - 1 - j;
      out = std::copy_n(values.begin() + first, layout.width, out);
    }
  }
  return panels;
}

}  // namespace picnn_fast
