#pragma once

#include <cstdint>

// How the elements of a tensor are stored. The same types in code for every instruction set: they
// have no functions.
namespace picnn_fast {

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace picnn_fast
