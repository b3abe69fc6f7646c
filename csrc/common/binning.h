#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

// Arithmetic of the histogram family. picnn_fast/reference/histogram.py is the definition.
namespace PICNN_FAST_NAMESPACE {

constexpr int kSmallestExponent = -100;
constexpr int kCellBits = 20;

// 2^exponent exactly, subnormal numbers included; 0 below them.
template <typename T>
PICNN_FAST_HD T power_of_two(int exponent);
template <>
PICNN_FAST_HD float power_of_two<float>(int exponent) {
  const uint32_t bits = exponent >= -126   ? static_cast<uint32_t>(exponent + 127) << 23
                        : exponent >= -149 ? uint32_t{1} << (exponent + 149)
                                           : 0;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
template <>
PICNN_FAST_HD double power_of_two<double>(int exponent) {
  const uint64_t bits = exponent >= -1022   ? static_cast<uint64_t>(exponent + 1023) << 52
                        : exponent >= -1074 ? uint64_t{1} << (exponent + 1074)
                                            : 0;
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// What finds the cells of width 2^exponent.
template <typename T>
struct CellScale {
  T inverse;  // 2^-exponent
  T width;    // 2^exponent, or the largest power of two where that overflows
};

template <typename T>
PICNN_FAST_HD CellScale<T> cell_scale(int exponent) {
  constexpr int largest = sizeof(T) == sizeof(float) ? 127 : 1023;
  return {power_of_two<T>(-exponent), power_of_two<T>(exponent < largest ? exponent : largest)};
}

// floor(x * 2^-exponent) for finite x with a result of at most 22 bits. Both products are exact
// but for underflow: x * inverse is then 0, and x itself says whether 0 lies above it. Where
// 2^exponent overflows, every x * inverse lies in (-1, 1), and width is multiplied by 0.
template <typename T>
PICNN_FAST_HD int32_t cell_of(T x, CellScale<T> scale) {
  const int32_t truncated = static_cast<int32_t>(x * scale.inverse);
  return truncated - (static_cast<T>(truncated) * scale.width > x ? 1 : 0);
}

// Bin j of a filter is [(first + j) * 2^exponent, (first + j + 1) * 2^exponent); the last bin in
// use is last - first < bins.
struct Grid {
  int32_t exponent, first, last;
};

// The grid of a finite range, minimum <= maximum; bins >= 2.
PICNN_FAST_HD Grid grid_of(double minimum, double maximum, int64_t bins) {
  uint64_t low, high;
  std::memcpy(&low, &minimum, sizeof(low));
  std::memcpy(&high, &maximum, sizeof(high));
  const uint64_t sign = uint64_t{1} << 63;
  low &= ~sign;
  high &= ~sign;
  int exponent = static_cast<int>((low > high ? low : high) >> 52) - 1023 - kCellBits;
  exponent = exponent > kSmallestExponent ? exponent : kSmallestExponent;
  const CellScale<double> scale = cell_scale<double>(exponent);
  int32_t first = cell_of(minimum, scale), last = cell_of(maximum, scale);
  while (last - first >= bins) {  // floor(x / 2) of an integer x is x >> 1, at most 21 times
    ++exponent;
    first >>= 1;
    last >>= 1;
  }
  return {exponent, first, last};
}

// A cell of a narrower grid on one that is `shift` exponents coarser.
PICNN_FAST_HD int32_t coarser_cell(int32_t cell, int shift) {
  return cell >> (shift < 31 ? shift : 31);
}

// Linear binning: bin `below` gets 1 - upper, the next one gets upper.
template <typename T>
struct SoftBin {
  int32_t below;
  T upper;
};

// Position among the bin centres, of which the first is `low`: t = j at that of bin j.
template <typename T>
PICNN_FAST_HD T soft_position(T x, T low, T width) {
  return (x - low) / width;
}

// bins in [2, 2^24]. NaN goes to bin 0 with weight NaN.
template <typename T>
PICNN_FAST_HD SoftBin<T> soft_bin(T t, T last) {  // last = bins - 1
  T inside = t > T(0) ? t : T(0);                 // NaN: 0
  inside = inside < last ? inside : last;
  int32_t below = static_cast<int32_t>(inside);
  below -= static_cast<T>(below) == last ? 1 : 0;
  const T upper = inside - static_cast<T>(below);
  return {below, t == t ? upper : t};
}

}  // namespace PICNN_FAST_NAMESPACE
