// CUDA kernels of the correlation family. picnn_fast/reference/correlation.py is the definition.
//
// Forward: sum_groups, a block for each image and group, whose warps take the group's filters; a
// map of up to 256 positions waits in registers while its norm is found and is read once, the norms
// of larger ones are found before (find_norms). moments and finish then need the sums alone.
// Backward: group_gradients makes the gradient of û of each image and group; that of a map needs
// the map and one of these: gradient_rows, a warp for each map, or gradient_columns, where channels
// lie side by side in memory. Every sum is added up in a fixed order.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "../common/correlation.h"
#include "launch.h"
#include "maps.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <typename T>
struct Problem {
  using A = Accumulate<T>;
  Maps<const T> in;
  const A* mean;          // [N, P]
  const int64_t* groups;  // [N]
  const bool* positive;   // [B] or null: all images count
  A* norms;               // [B, N]
  A* sums;                // [B, G, P]
  int64_t B, N, G, P;

  __device__ bool counts(int64_t b) const { return positive == nullptr || positive[b]; }
  __device__ int64_t group(int64_t n) const {
    const int64_t g = groups[n];
    PICNN_FAST_DEVICE_ASSERT(0 <= g && g < G);
    return g;
  }
  __device__ A centred(int64_t b, int64_t n, int64_t p) const {
    const T x = in.data[b * in.batch + n * in.channel + p * in.position];
    return static_cast<A>(x) - mean[n * P + p];
  }
};

// ---- Forward ----------------------------------------------------------------------------------

// A warp for each map.
template <typename T>
__global__ void __launch_bounds__(kThreads) find_norms(Problem<T> q) {
  using A = Accumulate<T>;
  const int64_t map = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t b = map / q.N, n = map % q.N;
  if (b >= q.B) return;  // a whole warp
  A squares = 0;
  if (q.counts(b)) {
    for (int64_t p = threadIdx.x % 32; p < q.P; p += 32) {
      const A u = q.centred(b, n, p);
      squares += u * u;
    }
  }
  squares = sum_warp(squares);
  if (threadIdx.x % 32 == 0) q.norms[map] = sqrt(squares);
}

// A block for each image, group and tile of 32 * kItems positions.
template <typename T, int kItems, bool kFindNorms>
__global__ void __launch_bounds__(kThreads) sum_groups(Problem<T> q) {
  using A = Accumulate<T>;
  constexpr int kTile = 32 * kItems;
  __shared__ A partial[kWarps][kTile];
  const int64_t tiles = ceil_div(q.P, kTile);
  const int64_t first = blockIdx.x % tiles * kTile;
  const int64_t g = blockIdx.x / tiles % q.G, b = blockIdx.x / tiles / q.G;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool counts = q.counts(b);
  A total[kItems] = {};
  for (int64_t some = warp * 32; some < q.N; some += kThreads) {
    const int64_t mine = some + lane;
    unsigned members = __ballot_sync(kFullWarp, mine < q.N && q.group(mine) == g);
    if (!counts) {
      if (kFindNorms && (members >> lane & 1u) != 0) q.norms[b * q.N + mine] = 0;
      continue;
    }
    for (; members != 0; members &= members - 1) {
      const int64_t n = some + __ffs(static_cast<int>(members)) - 1;
      A u[kItems], norm;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int64_t p = first + i * 32 + lane;
        u[i] = p < q.P ? q.centred(b, n, p) : A{0};
      }
      if constexpr (kFindNorms) {
        A squares = 0;
#pragma unroll
        for (int i = 0; i < kItems; ++i) squares += u[i] * u[i];
        norm = sqrt(sum_warp(squares));
        if (lane == 0) q.norms[b * q.N + n] = norm;
      } else {
        norm = q.norms[b * q.N + n];
      }
      const A inverse = inverse_norm(norm);
#pragma unroll
      for (int i = 0; i < kItems; ++i) total[i] += u[i] * inverse;
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) partial[warp][i * 32 + lane] = total[i];
  __syncthreads();
  for (int at = threadIdx.x; at < kTile && first + at < q.P; at += kThreads) {
    A sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += partial[w][at];
    q.sums[(b * q.G + g) * q.P + first + at] = sum;
  }
}

// A block for each image: ⟨S, S⟩ and ⟨S, Σ S⟩ of every group, [B, 2, G].
template <typename A>
__global__ void __launch_bounds__(kThreads)
    find_moments(const A* sums, A* of_images, int64_t G, int64_t P) {
  constexpr int kTile = 1024;
  __shared__ A total[kTile];
  const int64_t b = blockIdx.x;
  sums += b * G * P;
  A* within = of_images + b * 2 * G;
  A* across = within + G;
  for (int64_t first = 0; first < P; first += kTile) {
    const int count = static_cast<int>(P - first < kTile ? P - first : kTile);
    __syncthreads();
    for (int p = threadIdx.x; p < count; p += kThreads) {
      A sum = 0;
      for (int64_t g = 0; g < G; ++g) sum += sums[g * P + first + p];
      total[p] = sum;
    }
    __syncthreads();
    for (int64_t g = threadIdx.x / 32; g < G; g += kWarps) {
      A own = 0, all = 0;
      for (int p = threadIdx.x % 32; p < count; p += 32) {
        const A sum = sums[g * P + first + p];
        own += sum * sum;
        all += sum * total[p];
      }
      own = sum_warp(own);
      all = sum_warp(all);
      if (threadIdx.x % 32 != 0) continue;
      within[g] = first == 0 ? own : within[g] + own;
      across[g] = first == 0 ? all : across[g] + all;
    }
  }
}

// One block: Num and Den of every group, [2, G], and the loss.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish(Problem<T> q, const Accumulate<T>* of_images,
                                                   Accumulate<T>* moments, Accumulate<T>* loss) {
  using A = Accumulate<T>;
  __shared__ A losses[kWarps];
  A counted = 0;
  for (int64_t b = threadIdx.x % 32; b < q.B; b += 32) counted += q.counts(b) ? 1 : 0;
  counted = sum_warp(counted);
  const A images = static_cast<A>(q.B > 0 ? q.B : 1);
  A total = 0;
  for (int64_t g = threadIdx.x; g < q.G; g += kThreads) {
    A size = 0, own = 0, all = 0;
    for (int64_t n = 0; n < q.N; ++n) size += q.groups[n] == g ? 1 : 0;
    for (int64_t b = 0; b < q.B; ++b) {
      own += of_images[b * 2 * q.G + g];
      all += of_images[(b * 2 + 1) * q.G + g];
    }
    const A within = (own + counted * size * size) / images;
    const A across = (all + counted * size * static_cast<A>(q.N)) / images;
    moments[g] = within;
    moments[q.G + g] = across;
    total += group_loss(within, across);
  }
  total = sum_warp(total);
  if (threadIdx.x % 32 == 0) losses[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  total = 0;
  for (int w = 0; w < kWarps; ++w) total += losses[w];
  *loss = total;
}

// ---- Backward ---------------------------------------------------------------------------------

// The gradients of û, [B, G, P] in any order of the last two.
template <typename A>
struct Toward {
  A* data;
  int64_t group, position;
  __device__ A& at(int64_t b, int64_t g, int64_t p, int64_t G, int64_t P) const {
    return data[b * G * P + g * group + p * position];
  }
};

// A thread for each image and position.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    group_gradients(const A* sums, const A* moments, const A* grad_loss, Toward<A> toward,
                    int64_t B, int64_t G, int64_t P) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t b = index / P, p = index % P;
  if (b >= B) return;
  const A scale = *grad_loss / static_cast<A>(B);
  sums += b * G * P + p;
  A total = 0, weighted = 0;
  for (int64_t g = 0; g < G; ++g) {
    const A sum = sums[g * P];
    total += sum;
    weighted += group_gradient(moments[g], moments[G + g], scale).total * sum;
  }
  for (int64_t g = 0; g < G; ++g) {
    const auto gradient = group_gradient(moments[g], moments[G + g], scale);
    toward.at(b, g, p, G, P) = gradient.own * sums[g * P] + gradient.total * total + weighted;
  }
}

// A warp for each map; of up to 32 * kItems positions it is read once.
template <typename T, int kItems>
__global__ void __launch_bounds__(kThreads)
    gradient_rows(Problem<T> q, Toward<Accumulate<T>> toward, Maps<T> out) {
  using A = Accumulate<T>;
  constexpr int kStep = 32 * kItems;
  const int64_t map = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t b = map / q.N, n = map % q.N;
  const int lane = threadIdx.x % 32;
  if (b >= q.B) return;  // a whole warp
  T* y = out.data + b * out.batch + n * out.channel;
  if (!q.counts(b)) {
    for (int64_t p = lane; p < q.P; p += 32) y[p * out.position] = static_cast<T>(A{0});
    return;
  }
  const int64_t g = q.group(n);
  A u[kItems], to[kItems], product = 0;
  const auto load = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t p = first + i * 32 + lane;
      u[i] = p < q.P ? q.centred(b, n, p) : A{0};
      to[i] = p < q.P ? toward.at(b, g, p, q.G, q.P) : A{0};
    }
  };
  for (int64_t first = 0; first < q.P; first += kStep) {
    load(first);
#pragma unroll
    for (int i = 0; i < kItems; ++i) product += u[i] * to[i];
  }
  const auto gradient = map_gradient(q.norms[map], sum_warp(product));
  for (int64_t first = 0; first < q.P; first += kStep) {
    if (q.P > kStep) load(first);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t p = first + i * 32 + lane;
      if (p < q.P)
        y[p * out.position] = static_cast<T>(gradient.unit * to[i] - gradient.along * u[i]);
    }
  }
}

// A block holds `lanes` channels of an image side by side; its kThreads / lanes rows of them walk
// down the positions, twice: the maps come from the cache the second time.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gradient_columns(Problem<T> q, Toward<Accumulate<T>> toward, Maps<T> out, int lanes) {
  using A = Accumulate<T>;
  __shared__ A products[kThreads];
  const int64_t tiles = ceil_div(q.N, lanes);
  const int64_t b = blockIdx.x / tiles;
  const int lane = threadIdx.x % lanes, row = threadIdx.x / lanes, rows = kThreads / lanes;
  const int64_t n = blockIdx.x % tiles * lanes + lane;
  const bool counts = q.counts(b);
  const int64_t positions = n < q.N ? q.P : 0;
  const int64_t g = n < q.N ? q.group(n) : 0;
  A product = 0;
  if (counts) {
    for (int64_t p = row; p < positions; p += rows)
      product += q.centred(b, n, p) * toward.at(b, g, p, q.G, q.P);
  }
  products[threadIdx.x] = product;
  for (int half = rows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half) products[threadIdx.x] += products[threadIdx.x + half * lanes];
  }
  __syncthreads();
  MapGradient<A> gradient = {0, 0};
  if (counts && n < q.N) gradient = map_gradient(q.norms[b * q.N + n], products[lane]);
  T* y = out.data + b * out.batch + n * out.channel;
  for (int64_t p = row; p < positions; p += rows) {
    A value = 0;
    if (counts)
      value = gradient.unit * toward.at(b, g, p, q.G, q.P) - gradient.along * q.centred(b, n, p);
    y[p * out.position] = static_cast<T>(value);
  }
}

// ---- Launching --------------------------------------------------------------------------------

// What the kernels read that must be contiguous, kept until they are launched.
struct Arguments {
  Tensor mean, groups;
  std::optional<Tensor> positive;
};

Arguments check(const Tensor& maps, const Tensor& mean, const Tensor& groups,
                const std::optional<Tensor>& positive) {
  STD_TORCH_CHECK(maps.dim() == 4, "picnn_fast: maps must be [B, C, h, w]");
  check_device(mean, "mean", maps, "maps");
  check_device(groups, "groups", maps, "maps");
  STD_TORCH_CHECK(mean.dim() == 3 && mean.size(0) == maps.size(1) && mean.size(1) == maps.size(2) &&
                      mean.size(2) == maps.size(3) && mean.scalar_type() == accumulate_type(maps),
                  "picnn_fast: mean must be [C, h, w], float32, float64 for float64 maps");
  STD_TORCH_CHECK(groups.dim() == 1 && groups.size(0) == maps.size(1) &&
                      groups.scalar_type() == ScalarType::Long,
                  "picnn_fast: groups must be int64 [C]");
  Arguments made{torch::stable::contiguous(mean), torch::stable::contiguous(groups), {}};
  if (positive.has_value()) {
    check_device(*positive, "positive", maps, "maps");
    STD_TORCH_CHECK(positive->dim() == 1 && positive->size(0) == maps.size(0) &&
                        positive->scalar_type() == ScalarType::Bool,
                    "picnn_fast: positive must be bool [B]");
    made.positive = torch::stable::contiguous(*positive);
  }
  return made;
}

template <typename T>
Problem<T> problem(const Tensor& maps, const Arguments& given, const Tensor& norms,
                   const Tensor& sums) {
  using A = Accumulate<T>;
  return {input_maps<T>(maps),
          static_cast<const A*>(given.mean.data_ptr()),
          static_cast<const int64_t*>(given.groups.data_ptr()),
          given.positive ? static_cast<const bool*>(given.positive->data_ptr()) : nullptr,
          static_cast<A*>(norms.data_ptr()),
          static_cast<A*>(sums.data_ptr()),
          maps.size(0),
          maps.size(1),
          sums.size(1),
          positions(maps)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_correlation(
    const Tensor& maps, const Tensor& mean, const Tensor& groups, int64_t num_groups,
    const std::optional<Tensor>& positive) {
  const Arguments given = check(maps, mean, groups, positive);
  STD_TORCH_CHECK(num_groups >= 0, "picnn_fast: num_groups must be at least 0");
  const int64_t B = maps.size(0), N = maps.size(1), G = num_groups, P = positions(maps);
  const ScalarType type = accumulate_type(maps);
  Tensor loss = torch::stable::new_empty(maps, {}, type);
  Tensor norms = torch::stable::new_empty(maps, {B, N}, type);
  Tensor sums = torch::stable::new_empty(maps, {B, G, P}, type);
  Tensor moments = torch::stable::new_empty(maps, {2, G}, type);
  Tensor of_images = torch::stable::new_empty(maps, {B, 2, G}, type);
  with_type(maps, "maps", [&](auto value) {
    using T = decltype(value);
    using A = Accumulate<T>;
    const Problem<T> q = problem<T>(maps, given, norms, sums);
    if (P <= 64) {
      launch(maps, sum_groups<T, 2, true>, B * G, kThreads, 0, q);
    } else if (P <= 256) {
      launch(maps, sum_groups<T, 8, true>, B * G, kThreads, 0, q);
    } else {
      launch(maps, find_norms<T>, ceil_div(B * N, kWarps), kThreads, 0, q);
      launch(maps, sum_groups<T, 8, false>, B * G * ceil_div(P, 256), kThreads, 0, q);
    }
    auto* images = static_cast<A*>(of_images.data_ptr());
    if (G > 0)
      launch(maps, find_moments<A>, B, kThreads, 0, static_cast<const A*>(sums.data_ptr()), images,
             G, P);
    launch(maps, finish<T>, 1, kThreads, 0, q, static_cast<const A*>(images),
           static_cast<A*>(moments.data_ptr()), static_cast<A*>(loss.data_ptr()));
  });
  return {loss, norms, sums, moments};
}

Tensor group_correlation_backward(const Tensor& grad_loss, const Tensor& maps, const Tensor& mean,
                                  const Tensor& groups, const std::optional<Tensor>& positive,
                                  const Tensor& norms, const Tensor& sums, const Tensor& moments) {
  const Arguments given = check(maps, mean, groups, positive);
  const int64_t B = maps.size(0), N = maps.size(1), P = positions(maps);
  STD_TORCH_CHECK(moments.dim() == 2 && moments.size(0) == 2,
                  "picnn_fast: moments must be [2, num_groups]");
  const int64_t G = moments.size(1);
  STD_TORCH_CHECK(norms.dim() == 2 && norms.size(0) == B && norms.size(1) == N && sums.dim() == 3 &&
                      sums.size(0) == B && sums.size(1) == G && sums.size(2) == P &&
                      grad_loss.numel() == 1,
                  "picnn_fast: norms must be [B, C], sums [B, num_groups, h * w], grad_loss []");
  const std::pair<const Tensor*, const char*> others[] = {
      {&grad_loss, "grad_loss"}, {&norms, "norms"}, {&sums, "sums"}, {&moments, "moments"}};
  for (const auto& [tensor, name] : others) {
    check_device(*tensor, name, maps, "maps");
    STD_TORCH_CHECK(tensor->scalar_type() == accumulate_type(maps), "picnn_fast: ", name,
                    " must be float32, float64 for float64 maps");
  }
  Tensor grad = torch::stable::empty_like(maps);
  if (B == 0 || N == 0) return grad;
  const Tensor own_norms = torch::stable::contiguous(norms);
  const Tensor own_sums = torch::stable::contiguous(sums);
  const Tensor own_moments = torch::stable::contiguous(moments);
  const Tensor weights = torch::stable::empty_like(own_sums);
  with_type(maps, "maps", [&](auto value) {
    using T = decltype(value);
    using A = Accumulate<T>;
    const Problem<T> q = problem<T>(maps, given, own_norms, own_sums);
    const Maps<T> out = output_maps<T>(grad);
    const bool columns = N > 1 && P > 1 && q.in.channel == 1 && q.in.position != 1;
    const Toward<A> toward = {static_cast<A*>(weights.data_ptr()), columns ? 1 : P,
                              columns ? G : 1};
    launch(maps, group_gradients<A>, ceil_div(B * P, kThreads), kThreads, 0,
           static_cast<const A*>(own_sums.data_ptr()),
           static_cast<const A*>(own_moments.data_ptr()),
           static_cast<const A*>(grad_loss.data_ptr()), toward, B, G, P);
    if (columns) {
      int lanes = 128 / sizeof(T);  // one line of memory
      while (lanes / 2 >= N) lanes /= 2;
      launch(maps, gradient_columns<T>, B * ceil_div(N, lanes), kThreads, 0, q, toward, out, lanes);
    } else if (P <= 64) {
      launch(maps, gradient_rows<T, 2>, ceil_div(B * N, kWarps), kThreads, 0, q, toward, out);
    } else {
      launch(maps, gradient_rows<T, 8>, ceil_div(B * N, kWarps), kThreads, 0, q, toward, out);
    }
  });
  return grad;
}

}  // namespace
}  // namespace picnn_fast

PICNN_FAST_REGISTER_CUDA(m) {
  m.impl("group_correlation", TORCH_BOX(&picnn_fast::group_correlation));
  m.impl("group_correlation_backward", TORCH_BOX(&picnn_fast::group_correlation_backward));
}
