#pragma once

#include <cstdint>

namespace picnn_fast {

// What NumPy's RandomState.standard_normal((samples, columns)) draws, of which some columns are
// added to values: values[j, m] += weights[j] * noise[m, first + j], each product rounded alone.
struct LegacyNormal {
  const uint32_t* key;  // of MT19937, 624 words
  int position;         // the next of them
  int64_t samples, columns, first;
  int64_t count;  // of columns that are added
  const double* weights;
  double* values;  // [count, samples] contiguous
};

void add_legacy_normal(const LegacyNormal& noise);

}  // namespace picnn_fast
