// Compiled once for each instruction set: setup.py passes PICNN_FAST_NAMESPACE and
// PICNN_FAST_KERNELS. Only headers whose functions live in that namespace may be included.
#include "histogram_kernels.h"

#include "histogram_by_class.h"
#include "histogram_hard.h"
#include "histogram_information.h"
#include "histogram_sliced.h"
#include "histogram_sliced_by_class.h"
#include "histogram_soft.h"

namespace PICNN_FAST_NAMESPACE {
namespace {

template <typename T>
constexpr picnn_fast::HistogramKernels<T> kernels_of() {
  picnn_fast::HistogramKernels<T> kernels{};
  kernels.count_short = count<T, uint16_t>;
  kernels.count_long = count<T, uint32_t>;
#if defined(__AVX512F__)
  kernels.count_sliced = count_sliced<T>;
  kernels.count_sliced_by_class = count_sliced_by_class<T>;
#endif
  kernels.range = range<T>;
  kernels.count_into = count_into<T>;
  kernels.count_by_class = count_by_class<T>;
  kernels.soft = soft<T>;
  kernels.soft_backward = soft_backward<T>;
  return kernels;
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

namespace picnn_fast {
constexpr HistogramKernelTable PICNN_FAST_KERNELS = {
    PICNN_FAST_NAMESPACE::kernels_of<float>(),
    PICNN_FAST_NAMESPACE::kernels_of<double>(),
    PICNN_FAST_NAMESPACE::kernels_of<Half>(),
    PICNN_FAST_NAMESPACE::kernels_of<BFloat16>(),
    {PICNN_FAST_NAMESPACE::information<int64_t>, nullptr},
    {PICNN_FAST_NAMESPACE::information<float>, PICNN_FAST_NAMESPACE::information_backward<float>},
    {PICNN_FAST_NAMESPACE::information<double>,
     PICNN_FAST_NAMESPACE::information_backward<double>}};
}  // namespace picnn_fast
