#pragma once

#include <cstdint>

#include "storage.h"
#include "units.h"

// The loops of the masking family, compiled once for each instruction set (masking_kernels.cpp).
namespace picnn_fast {

// Everything one call needs.
struct ScaleMaps {
  MapsShape shape;
  Units units;
  const void* maps;
  Strides maps_strides;
  const void* mask;  // [B, N] contiguous, float or double
  void* out;
  Strides out_strides;
  bool stream;  // write past the caches
};

struct MaskingBackward {
  MapsShape shape;
  Units units;
  const void* grad;
  Strides grad_strides;
  const void* maps;
  Strides maps_strides;
  const void* mask;  // [B, N] contiguous, float or double
  void* grad_maps;
  Strides grad_maps_strides;
  void* grad_mask;  // [B, N] contiguous
  bool stream;      // write past the caches
};

struct Draw {
  int64_t classes, filters;
  const void* logits;  // [B, K]
  int64_t logits_strides[2];
  const void* correspondence;  // [K, N]
  int64_t correspondence_strides[2];
  uint64_t seed;
  uint32_t rank;
  void* mask;       // [B, N] contiguous
  int64_t* labels;  // [B]
};

// Gradients of mask = one_hot @ correspondence; everything contiguous, all floats of one type.
struct ParametersBackward {
  int64_t batch, classes, filters;
  const void* grad_mask;       // [B, N]
  const void* logits;          // [B, K]
  const void* correspondence;  // [K, N]
  const int64_t* labels;       // [B]
  const void* grad_y1;         // grad_mask @ correspondence^T [B, K], or null to work it out
  void* grad_logits;           // [B, K]
  void* grad_correspondence;   // [K, N]
};

struct MaskingKernels {
  // Samples [begin, end). scratch holds `classes` integers.
  void (*draw)(const Draw&, bool double_logits, bool double_correspondence, bool double_mask,
               int64_t begin, int64_t end, int64_t* scratch);
  // Units [begin, end). binary: the mask holds only 0 and 1.
  void (*scale)(const ScaleMaps&, Storage, bool binary, int64_t begin, int64_t end);
  // Units [begin, end).
  void (*backward)(const MaskingBackward&, Storage, int64_t begin, int64_t end);
  // grad_logits of samples [begin, end). scratch holds `classes` numbers.
  void (*logits_backward)(const ParametersBackward&, bool is_double, int64_t begin, int64_t end,
                          void* scratch);
  // grad_correspondence of filters [begin, end).
  void (*correspondence_backward)(const ParametersBackward&, bool is_double, int64_t begin,
                                  int64_t end);
};

extern const MaskingKernels masking_kernels_default;
#ifdef __x86_64__
extern const MaskingKernels masking_kernels_avx2;
extern const MaskingKernels masking_kernels_avx512;
#endif

}  // namespace picnn_fast
