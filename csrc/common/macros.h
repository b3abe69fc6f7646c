#pragma once

// Shared by host and device code, so that every backend does the same arithmetic.
#ifdef __CUDACC__
#define PICNN_FAST_HD __host__ __device__ __forceinline__
#else
#define PICNN_FAST_HD inline __attribute__((always_inline))
#endif

// The CPU kernels are compiled once for each instruction set, each in a namespace of its own:
// otherwise the linker would keep a single copy of an inline function, perhaps one that needs
// AVX-512, for all of them.
#ifndef PICNN_FAST_NAMESPACE
#define PICNN_FAST_NAMESPACE picnn_fast
#endif
