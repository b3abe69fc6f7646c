#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/macros.h"
#include "../common/types.h"

// Storage types and their conversions, in branch-free integer arithmetic that compilers vectorise.
namespace PICNN_FAST_NAMESPACE {

using picnn_fast::Accumulate;
using picnn_fast::BFloat16;
using picnn_fast::Half;

template <typename To, typename From>
PICNN_FAST_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

PICNN_FAST_HD float widen(float x) { return x; }
PICNN_FAST_HD double widen(double x) { return x; }
PICNN_FAST_HD float widen(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
PICNN_FAST_HD float widen(Half x) {
  const uint32_t magnitude = x.bits & 0x7FFFu;
  uint32_t bits = (magnitude << 13) + (112u << 23);  // exponent bias 15 -> 127
  bits += magnitude >= 0x7C00u ? 112u << 23 : 0u;    // infinity and NaN
  const float subnormal =
      static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f;
  bits = magnitude < 0x0400u ? bit_cast<uint32_t>(subnormal) : bits;
  return bit_cast<float>(bits | (x.bits & 0x8000u) << 16);
}

// Calls run with a value of the storage type and one of its accumulation type.
template <typename Run>
void with_storage(picnn_fast::Storage storage, const Run& run) {
  switch (storage) {
    case picnn_fast::Storage::kFloat:
      return run(float{}, float{});
    case picnn_fast::Storage::kDouble:
      return run(double{}, double{});
    case picnn_fast::Storage::kHalf:
      return run(Half{}, float{});
    case picnn_fast::Storage::kBFloat16:
      return run(BFloat16{}, float{});
  }
}

// Round to nearest, ties to even.
template <typename T, typename A>
PICNN_FAST_HD T narrow(A x) {
  if constexpr (sizeof(T) != 2) {
    return x;
  } else {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = bits & 0x80000000u;
    const uint32_t magnitude = bits ^ sign;
    const bool nan = magnitude > 0x7F800000u;
    if constexpr (std::is_same_v<T, BFloat16>) {
      const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
      return T{static_cast<uint16_t>(nan ? 0x7FC0u : rounded)};
    } else {
      const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
      // Below 2^-14 the step is 2^-24, the last bit of a float in [0.5, 1).
      const uint32_t subnormal =
          bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
      uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
      half = magnitude >= (143u << 23) ? 0x7C00u : half;  // 65536 and above
      half = nan ? 0x7E00u : half;
      return T{static_cast<uint16_t>(half | sign >> 16)};
    }
  }
}

}  // namespace PICNN_FAST_NAMESPACE
