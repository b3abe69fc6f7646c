#pragma once

// Runs CUDA kernels on a CPU, for tests: force-included (-include) into a .cu file that g++
// compiles as C++. Each thread of a block is a fibre (a stack of its own, switched by hand), blocks
// run one after another. What it checks while it runs:
//   - barriers: every thread of a block must reach the same __syncthreads, none may have returned;
//   - warp operations: every lane named in the mask must reach the same operation with that mask;
//   - shared memory holds 0xFF bytes (a NaN, or -1) when a block starts, so reading what no thread
//     wrote shows in the result; writing past the launch's dynamic shared memory is an error;
//   - PICNN_FAST_FIBRE_ORDER chooses in which order threads and blocks run: "forward" (default),
//     "reversed", or "shuffled:SEED", drawn anew at each turn. A thread runs until it has to wait,
//     so a missing barrier gives another result under one of the orders.
//   - PICNN_FAST_FIBRE_WARPS: "in_turn" (default) goes from warp to warp at every warp operation,
//     "one_by_one" runs a warp up to the block's next barrier before another begins, as warps that
//     are far apart do.
// PICNN_FAST_FIBRE_MEMORY: "poisoned" (default) shared memory, or "kept", with what the block
// before left there, which is as likely on a device: code that makes up for a NaN hides nothing
// then. PICNN_FAST_FIBRE_SUMS: the matrix units truncate each sum of products "once" (default) or
// after "each" product; nothing says which a device does. PICNN_FAST_FIBRE_SHARED is the bytes of
// shared memory a block may ask for, 227 KB if not set. Not modelled: races between threads of one
// warp that lock-step execution would hide or show, memory ordering, and the sizes of registers and
// of the device. Any error ends the launch as a std::runtime_error that says where.

#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#define PICNN_FAST_CUDA_ON_CPU

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Thread-local, because the loader can say where a library's thread-local variables lie: that is
// what is poisoned. Only the thread that launches ever sees them.
#define __shared__ thread_local

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_on_cpu {
struct Index {
  unsigned x = 0, y = 0, z = 0;
};
}  // namespace cuda_on_cpu

inline cuda_on_cpu::Index threadIdx, blockIdx;
inline dim3 blockDim(1), gridDim(1);
constexpr int warpSize = 32;

namespace cuda_on_cpu {
constexpr size_t kSharedLimit = 48 << 10;  // without cudaFuncSetAttribute
constexpr size_t kMostShared = 227 << 10;  // with it, on the largest device modelled
constexpr size_t kGuard = 1024;
}  // namespace cuda_on_cpu

// What dynamic_shared in csrc/cuda/launch.h declares.
namespace picnn_fast {
alignas(16) inline thread_local unsigned char picnn_fast_dynamic_shared[cuda_on_cpu::kMostShared +
                                                                        cuda_on_cpu::kGuard];
}  // namespace picnn_fast

namespace cuda_on_cpu {

using picnn_fast::picnn_fast_dynamic_shared;

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned char kPoison = 0xFF, kGuardByte = 0xA5;

// Where in the source a thread stands.
struct Place {
  const char* what;
  const char* file;
  int line;
  bool operator==(const Place& o) const {
    return line == o.line && std::strcmp(what, o.what) == 0 && std::strcmp(file, o.file) == 0;
  }
};
inline std::ostream& operator<<(std::ostream& out, const Place& p) {
  return out << p.what << " at " << p.file << ":" << p.line;
}

struct Fibre {
  jmp_buf where;
  Index index;
  bool started = false, returned = false;
  bool waiting_block = false;  // at the block's barrier, in `place`
  int waiting_slot = -1;       // at a warp operation
  Place place{"", "", 0};
  std::array<int, 3> votes{};  // results of the last barrier: count, and, or
};

// One warp operation under way: lanes hand in a value, and leave once all have arrived.
struct WarpSlot {
  bool used = false;
  unsigned warp = 0;
  uint32_t mask = 0, arrived = 0, left = 0;
  Place place{"", "", 0};
  std::array<uint64_t, 32> values{};
};

class Executor {
 public:
  int64_t launches = 0;

  static Executor& get() {
    static Executor executor;
    return executor;
  }

  template <typename Body>
  void launch(dim3 grid, dim3 block, size_t shared_bytes, const Body& body, size_t shared_limit) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > kMaxThreads) fail("a block of ", threads, " threads");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("a grid without blocks");
    if (shared_bytes > shared_limit) fail(shared_bytes, " bytes of dynamic shared memory");
    ++launches;
    body_ = body;
    gridDim = grid;
    blockDim = block;
    choose_modes();
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
    arrange(order);
    for (const uint64_t b : order) {
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
      run_block(threads, shared_bytes);
    }
  }

  void barrier(Place place, bool vote, std::array<int, 3>* result) {
    Fibre& me = *current_;
    me.place = place;
    me.waiting_block = true;
    me.votes = {vote, vote, vote};
    wait();
    *result = me.votes;
  }

  // Hands in `value` and returns what all lanes of the mask handed in.
  std::array<uint64_t, 32> meet(Place place, uint32_t mask, uint64_t value) {
    Fibre& me = *current_;
    const unsigned linear = linear_index(me.index);
    const unsigned warp = linear / 32, lane = linear % 32;
    const uint32_t bit = 1u << lane;
    if ((mask & bit) == 0) fail(name(me), ": not in its own mask, ", place);
    WarpSlot* slot = nullptr;
    size_t number = 0;
    for (size_t i = 0; i < slots_.size(); ++i) {
      WarpSlot& s = slots_[i];
      // A completed operation that this lane has left is of the past.
      if (s.used && s.warp == warp && s.arrived != s.mask && (s.mask & mask) != 0) {
        if (s.mask != mask || !(s.place == place))
          fail(name(me), ": ", place, " with mask ", std::hex, mask, ", but other lanes wait in ",
               s.place, " with mask ", s.mask);
        slot = &s;
        number = i;
      }
    }
    if (slot == nullptr) {
      number = 0;
      while (number < slots_.size() && slots_[number].used) ++number;
      if (number == slots_.size()) slots_.emplace_back();
      slot = &slots_[number];
      *slot = WarpSlot{};
      slot->used = true;
      slot->warp = warp;
      slot->mask = mask;
      slot->place = place;
    }
    slot->arrived |= bit;
    slot->values[lane] = value;
    if (slot->arrived != mask) {
      me.place = place;
      me.waiting_slot = static_cast<int>(number);
      wait();
    }
    WarpSlot& done = slots_[number];
    const std::array<uint64_t, 32> values = done.values;
    done.left |= bit;
    if (done.left == mask) done.used = false;
    return values;
  }

  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    message << "cuda_on_cpu: ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  std::string here() { return name(*current_); }
  unsigned lane() { return linear_index(current_->index) % 32; }
  bool truncates_each() const { return truncates_each_; }

 private:
  Executor() : fibres_(kMaxThreads) {
    stacks_ = static_cast<char*>(mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks_ == MAP_FAILED) throw std::bad_alloc();
  }

  static unsigned linear_index(const Index& i) {
    return i.x + blockDim.x * (i.y + blockDim.y * i.z);
  }
  std::string name(const Fibre& f) {
    std::ostringstream out;
    out << "thread " << linear_index(f.index) << " of block (" << blockIdx.x << ", " << blockIdx.y
        << ", " << blockIdx.z << ")";
    return out.str();
  }

  // Whether the variable holds `other`, not `usual` or nothing.
  bool chosen(const char* variable, const char* usual, const char* other) {
    const char* set = std::getenv(variable);
    const std::string value = set == nullptr ? usual : set;
    if (value != usual && value != other)
      fail(variable, ": got ", value, ", want ", usual, " or ", other);
    return value == other;
  }
  void choose_modes() {
    one_by_one_ = chosen("PICNN_FAST_FIBRE_WARPS", "in_turn", "one_by_one");
    kept_ = chosen("PICNN_FAST_FIBRE_MEMORY", "poisoned", "kept");
    truncates_each_ = chosen("PICNN_FAST_FIBRE_SUMS", "once", "each");
    const char* value = std::getenv("PICNN_FAST_FIBRE_ORDER");
    const std::string order = value == nullptr ? "forward" : value;
    reversed_ = order == "reversed";
    shuffled_ = order.rfind("shuffled:", 0) == 0;
    if (shuffled_) random_.seed(std::stoul(order.substr(9)));
    if (!reversed_ && !shuffled_ && order != "forward")
      fail("PICNN_FAST_FIBRE_ORDER: got ", order, ", want forward, reversed or shuffled:SEED");
  }
  template <typename T>
  void arrange(std::vector<T>& items) {
    if (reversed_) std::reverse(items.begin(), items.end());
    if (shuffled_) std::shuffle(items.begin(), items.end(), random_);
  }

  // The thread-local variables of this library in this thread: all that is __shared__.
  struct Span {
    unsigned char* begin;
    size_t size;
  };
  static Span shared_variables() {
    // The loader allocates them at the first touch.
    static_cast<void>(*static_cast<volatile unsigned char*>(picnn_fast_dynamic_shared));
    Span span{nullptr, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
          if (begin == nullptr) return 0;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type == PT_TLS && picnn_fast_dynamic_shared >= begin &&
                picnn_fast_dynamic_shared < begin + header.p_memsz)
              *static_cast<Span*>(out) = {begin, header.p_memsz};
          }
          return 0;
        },
        &span);
    return span;
  }

  void run_block(unsigned threads, size_t shared_bytes) {
    const Span shared = shared_variables();
    if (shared.begin == nullptr) fail("shared memory not found");
    // All but what lies behind the launch's dynamic shared memory.
    unsigned char* const end = picnn_fast_dynamic_shared + sizeof(picnn_fast_dynamic_shared);
    if (!kept_) {
      std::memset(shared.begin, kPoison, picnn_fast_dynamic_shared + shared_bytes - shared.begin);
      std::memset(end, kPoison, shared.begin + shared.size - end);
    }
    std::memset(picnn_fast_dynamic_shared + shared_bytes, kGuardByte, kGuard);

    slots_.clear();
    error_ = nullptr;
    std::vector<Fibre*> turn(threads);
    for (unsigned t = 0; t < threads; ++t) {
      fibres_[t] = Fibre{};
      fibres_[t].index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
      turn[t] = &fibres_[t];
    }
    // Groups of threads, of which one goes as far as it can before the next begins.
    const unsigned size = one_by_one_ ? 32 : threads;
    std::vector<std::vector<Fibre*>> groups;
    for (unsigned t = 0; t < threads; t += size)
      groups.emplace_back(turn.begin() + t, turn.begin() + std::min(t + size, threads));
    if (reversed_) {
      std::reverse(groups.begin(), groups.end());
      for (auto& group : groups) std::reverse(group.begin(), group.end());
    }
    for (unsigned returned = 0; returned < threads;) {
      if (shuffled_) std::shuffle(groups.begin(), groups.end(), random_);
      for (auto& group : groups)
        while (run_once(group, returned)) continue;
      if (returned < threads) release_barrier(turn);
    }
    for (size_t i = 0; i < kGuard; ++i)
      if (picnn_fast_dynamic_shared[shared_bytes + i] != kGuardByte)
        fail("block (", blockIdx.x, ", ", blockIdx.y, ", ", blockIdx.z, ") wrote past its ",
             shared_bytes, " bytes of dynamic shared memory");
  }

  // Each thread of a group that need not wait goes on, once; whether there is one.
  bool run_once(std::vector<Fibre*>& group, unsigned& returned) {
    if (shuffled_) std::shuffle(group.begin(), group.end(), random_);
    bool ran = false;
    for (Fibre* f : group) {
      if (f->returned || f->waiting_block || !may_go_on(*f)) continue;
      ran = true;
      resume(*f);
      if (error_) std::rethrow_exception(error_);
      if (f->returned) ++returned;
    }
    return ran;
  }

  bool may_go_on(Fibre& f) {
    if (f.waiting_slot < 0) return true;
    const WarpSlot& slot = slots_[f.waiting_slot];
    if (slot.arrived != slot.mask) return false;
    f.waiting_slot = -1;
    return true;
  }

  // Nothing can run: either the whole block stands at one barrier, or the kernel is wrong.
  void release_barrier(const std::vector<Fibre*>& fibres) {
    for (const Fibre* f : fibres) {
      if (f->waiting_slot < 0) continue;
      const WarpSlot& slot = slots_[f->waiting_slot];
      fail(name(*f), " waits in ", slot.place, " for lanes that never come: mask ", std::hex,
           slot.mask, ", arrived ", slot.arrived);
    }
    const Fibre& first =
        **std::find_if(fibres.begin(), fibres.end(), [](const Fibre* f) { return !f->returned; });
    int count = 0;
    for (const Fibre* f : fibres) {
      if (f->returned)
        fail(name(*f), " has returned, while ", name(first), " waits in ", first.place);
      if (!(f->place == first.place))
        fail(name(*f), " waits in ", f->place, ", while ", name(first), " waits in ", first.place);
      count += f->votes[0];
    }
    const bool all = count == static_cast<int>(fibres.size());
    for (Fibre* f : fibres) {
      f->waiting_block = false;
      f->votes = {count, all, count > 0};
    }
  }

  void resume(Fibre& f) {
    current_ = &f;
    threadIdx = f.index;
    if (_setjmp(scheduler_) != 0) return;
    if (f.started) _longjmp(f.where, 1);
    f.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_ + kStackBytes * (&f - fibres_.data());
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Executor::enter, 0);
    setcontext(&context);
  }

  __attribute__((noinline)) void wait() {
    if (_setjmp(current_->where) == 0) _longjmp(scheduler_, 1);
  }

  static void enter() {
    Executor& executor = get();
    try {
      executor.body_();
    } catch (...) {
      executor.error_ = std::current_exception();
    }
    executor.current_->returned = true;
    _longjmp(executor.scheduler_, 1);
  }

  std::mutex mutex_;
  std::function<void()> body_;
  std::vector<Fibre> fibres_;
  std::vector<WarpSlot> slots_;
  char* stacks_;
  Fibre* current_ = nullptr;
  jmp_buf scheduler_;
  std::exception_ptr error_;
  bool reversed_ = false, shuffled_ = false, one_by_one_ = false, kept_ = false;
  bool truncates_each_ = false;
  std::mt19937_64 random_;
};

template <typename Body>
void launch(dim3 grid, dim3 block, size_t shared_bytes, const Body& body,
            size_t shared_limit = kSharedLimit) {
  Executor::get().launch(grid, block, shared_bytes, body, shared_limit);
}

// Of this library's kernels so far.
extern "C" __attribute__((used)) inline int64_t cuda_on_cpu_launches() {
  return Executor::get().launches;
}

inline int64_t most_shared_bytes() {
  const char* value = std::getenv("PICNN_FAST_FIBRE_SHARED");
  const size_t bytes = value == nullptr ? kMostShared : std::stoul(value);
  if (bytes > kMostShared)
    Executor::get().fail("PICNN_FAST_FIBRE_SHARED: got ", value, ", want at most ", kMostShared);
  return static_cast<int64_t>(bytes);
}

inline void device_assert(bool condition, const char* text) {
  if (!condition) Executor::get().fail("assertion failed in ", Executor::get().here(), ": ", text);
}

template <typename T>
uint64_t pack(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

// What lane `source` of the calling lane's group of `width` handed in; its own value where the
// source lies outside the group.
template <typename T>
T exchange(Place place, uint32_t mask, T value, int source, bool inside) {
  Executor& executor = Executor::get();
  const auto values = executor.meet(place, mask, pack(value));
  if (!inside) return value;
  if ((mask >> source & 1u) == 0)
    executor.fail(executor.here(), " reads lane ", source, ", which is not in the mask: ", place);
  T result;
  std::memcpy(&result, &values[source], sizeof(T));
  return result;
}

}  // namespace cuda_on_cpu

// The caller's place, so that two different barriers are told apart.
#define PICNN_FAST_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(PICNN_FAST_PLACE) {
  std::array<int, 3> votes;
  cuda_on_cpu::Executor::get().barrier({"__syncthreads", file, line}, false, &votes);
}
inline int __syncthreads_count(int predicate, PICNN_FAST_PLACE) {
  std::array<int, 3> votes;
  cuda_on_cpu::Executor::get().barrier({"__syncthreads_count", file, line}, predicate != 0, &votes);
  return votes[0];
}
inline int __syncthreads_and(int predicate, PICNN_FAST_PLACE) {
  std::array<int, 3> votes;
  cuda_on_cpu::Executor::get().barrier({"__syncthreads_and", file, line}, predicate != 0, &votes);
  return votes[1];
}
inline int __syncthreads_or(int predicate, PICNN_FAST_PLACE) {
  std::array<int, 3> votes;
  cuda_on_cpu::Executor::get().barrier({"__syncthreads_or", file, line}, predicate != 0, &votes);
  return votes[2];
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, PICNN_FAST_PLACE) {
  cuda_on_cpu::Executor::get().meet({"__syncwarp", file, line}, mask, 0);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, PICNN_FAST_PLACE) {
  const int lane = static_cast<int>(cuda_on_cpu::Executor::get().lane());
  return cuda_on_cpu::exchange({"__shfl_sync", file, line}, mask, value,
                               lane / width * width + (source & (width - 1)), true);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, PICNN_FAST_PLACE) {
  const int lane = static_cast<int>(cuda_on_cpu::Executor::get().lane());
  const int source = lane ^ lanes;
  return cuda_on_cpu::exchange({"__shfl_xor_sync", file, line}, mask, value, source,
                               source < (lane / width + 1) * width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, PICNN_FAST_PLACE) {
  const int lane = static_cast<int>(cuda_on_cpu::Executor::get().lane());
  const int source = lane - static_cast<int>(delta);
  return cuda_on_cpu::exchange({"__shfl_up_sync", file, line}, mask, value, source,
                               source >= lane / width * width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, PICNN_FAST_PLACE) {
  const int lane = static_cast<int>(cuda_on_cpu::Executor::get().lane());
  const int source = lane + static_cast<int>(delta);
  return cuda_on_cpu::exchange({"__shfl_down_sync", file, line}, mask, value, source,
                               source < (lane / width + 1) * width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, PICNN_FAST_PLACE) {
  const auto votes = cuda_on_cpu::Executor::get().meet({"__ballot_sync", file, line}, mask,
                                                       predicate != 0 ? 1 : 0);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1u) != 0 && votes[lane] != 0) ballot |= 1u << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate, PICNN_FAST_PLACE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, PICNN_FAST_PLACE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, PICNN_FAST_PLACE) {
  const auto values =
      cuda_on_cpu::Executor::get().meet({"__reduce_max_sync", file, line}, mask, value);
  unsigned most = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1u) != 0) most = std::max(most, static_cast<unsigned>(values[lane]));
  return most;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, PICNN_FAST_PLACE) {
  return ~__reduce_max_sync(mask, ~value, file, line);
}

// The matrix units' c += a·b for a whole warp, with operands cut to 10-bit mantissas and sums to 23
// bits, not rounded, as often as PICNN_FAST_FIBRE_SUMS says. Where lanes hold the elements:
// csrc/cuda/matrix_units.h.
inline void mma_m16n8k8_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2],
                             PICNN_FAST_PLACE) {
  const auto cut = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return uint64_t{bits & 0xFFFFE000u};
  };
  const auto back = [](uint64_t bits) {
    const auto low = static_cast<uint32_t>(bits);
    float x;
    std::memcpy(&x, &low, sizeof(x));
    return double{x};
  };
  const auto truncated = [](double sum) {
    const auto nearest = static_cast<float>(sum);
    return std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
  };
  auto& executor = cuda_on_cpu::Executor::get();
  std::array<std::array<uint64_t, 32>, 3> lanes;
  for (int i = 0; i < 3; ++i) {
    const float* pair = i < 2 ? a + 2 * i : b;
    lanes[i] = executor.meet({"mma_m16n8k8_tf32", file, line}, 0xFFFFFFFFu,
                             cut(pair[0]) | cut(pair[1]) << 32);
  }
  const unsigned group = executor.lane() / 4, place = executor.lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = group + 8 * (i / 2), column = 2 * place + i % 2;
    double sum = c[i];
    for (unsigned k = 0; k < 8; ++k) {
      const uint64_t of_a = lanes[k / 4][row % 8 * 4 + k % 4] >> (row < 8 ? 0 : 32);
      const uint64_t of_b = lanes[2][column * 4 + k % 4] >> (k < 4 ? 0 : 32);
      sum += back(of_a) * back(of_b);
      if (executor.truncates_each()) sum = truncated(sum);
    }
    c[i] = truncated(sum);
  }
}
#undef PICNN_FAST_PLACE

// Fibres switch only where they wait, so these are atomic as they stand.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}
template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}
template <typename T>
T atomicCAS(T* address, T compare, T value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}
inline int __ffs(int word) { return __builtin_ffs(word); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
