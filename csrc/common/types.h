#pragma once

#include <cstdint>
#include <type_traits>

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

// The type that sums of T are kept in.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace picnn_fast
