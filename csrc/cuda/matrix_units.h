#pragma once

#include <cstdint>
#include <cstring>

#include "launch.h"

// Products of small tiles by the matrix units, as a whole warp; numbers with 10-bit mantissas
// ("tf32") go in, float32 sums come out.
namespace picnn_fast {

// c += a·b for a [16, 8], b [8, 8] and c [16, 8]. With g = lane / 4 and t = lane % 4, a lane holds
//   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   b: (t, g), (t + 4, g)
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ __forceinline__ void multiply_tiles(float (&c)[4], const float (&a)[4],
                                               const float (&b)[2]) {
#ifdef PICNN_FAST_CUDA_ON_CPU
  mma_m16n8k8_tf32(c, a, b);
#elif __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#else
  __trap();
#endif
}

// Rounded to a 10-bit mantissa, for |x| < 2^127; not for NaN.
PICNN_FAST_HD float ten_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits = (bits + 0x1000u) & 0xFFFFE000u;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// x = high + low but for 2^-22 of it, both with 10-bit mantissas: the products of three pairs of
// them are that of two floats but for some 2^-21.
struct alignas(8) Split {  // read at once
  float high, low;
};
PICNN_FAST_HD Split split(float x) {
  const float high = ten_bits(x);
  return {high, ten_bits(x - high)};
}

// What split takes. The sums of what it refuses need infinities and NaN where they belong.
PICNN_FAST_HD bool splits(float x) { return -1e38f <= x && x <= 1e38f; }

}  // namespace picnn_fast
