// NumPy's legacy normal numbers, which break ties in scikit-learn's mutual information, bit for
// bit: MT19937 (Matsumoto, Nishimura, ACM TOMACS 8(1), 1998), doubles of 53 bits, and the polar
// method (Marsaglia, Bray, SIAM Review 6(3), 1964). An attempt takes four words whether it is
// accepted or not, so that attempts are independent of each other once the words are there: those
// of the next chunk are made while threads work on this one.
#include "legacy_normal.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

namespace picnn_fast {
namespace {

class Twister {
 public:
  Twister(const uint32_t* key, int position) : position_(position) {
    std::copy_n(key, kWords, key_.begin());
  }

  void fill(uint32_t* out, int64_t count) {
    while (count > 0) {
      if (position_ == kWords) {
        twist();
        position_ = 0;
      }
      const int64_t some = std::min<int64_t>(count, kWords - position_);
      const uint32_t* __restrict__ from = key_.data() + position_;
      uint32_t* __restrict__ to = out;
      for (int64_t i = 0; i < some; ++i) {
        uint32_t word = from[i];
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c5680u;
        word ^= (word << 15) & 0xefc60000u;
        to[i] = word ^ (word >> 18);
      }
      position_ += static_cast<int>(some);
      out += some;
      count -= some;
    }
  }

 private:
  static constexpr int kWords = 624, kShift = 397;

  static uint32_t mixed(uint32_t high, uint32_t low) {
    const uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
    return (y >> 1) ^ ((0u - (y & 1u)) & 0x9908b0dfu);
  }

  void twist() {
    uint32_t* k = key_.data();
    for (int i = 0; i < kWords - kShift; ++i) k[i] = k[i + kShift] ^ mixed(k[i], k[i + 1]);
    for (int i = kWords - kShift; i < kWords - 1; ++i)
      k[i] = k[i + kShift - kWords] ^ mixed(k[i], k[i + 1]);
    k[kWords - 1] = k[kShift - 1] ^ mixed(k[kWords - 1], k[0]);
  }

  std::array<uint32_t, kWords> key_;
  int position_;
};

// In [0, 1).
double uniform(const uint32_t* words) {
  return ((words[0] >> 5) * 67108864.0 + (words[1] >> 6)) * (1.0 / 9007199254740992.0);
}

// A thread's part of a chunk: the normals of its attempts in a row.
class Attempts {
 public:
  const double* normals() const { return normals_.data(); }
  int64_t size() const { return size_; }

  void operator()(const uint32_t* words, int64_t count) {
    for (std::vector<double>* memory : {&first_, &second_, &square_, &logarithm_}) {
      memory->resize(static_cast<size_t>(count));
    }
    normals_.resize(static_cast<size_t>(2 * count));
    const int64_t accepted = accept(words, count);
    for (int64_t i = 0; i < accepted; ++i) logarithm_[i] = std::log(square_[i]);
    const double *first = first_.data(), *second = second_.data();
    const double *square = square_.data(), *logarithm = logarithm_.data();
    double* normals = normals_.data();
    for (int64_t i = 0; i < accepted; ++i) {
      const double factor = std::sqrt(-2.0 * logarithm[i] / square[i]);
      normals[2 * i] = factor * second[i];
      normals[2 * i + 1] = factor * first[i];
    }
    size_ = 2 * accepted;
  }

 private:
  // Points in the unit circle, written without a branch: what is not accepted is written over.
  int64_t accept(const uint32_t* words, int64_t count) {
    int64_t accepted = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double first = 2.0 * uniform(words + 4 * i) - 1.0;
      const double second = 2.0 * uniform(words + 4 * i + 2) - 1.0;
      const double square = first * first + second * second;
      first_[accepted] = first;
      second_[accepted] = second;
      square_[accepted] = square;
      accepted += static_cast<int64_t>(square < 1.0) & static_cast<int64_t>(square != 0.0);
    }
    return accepted;
  }

  std::vector<double> first_, second_, square_, logarithm_, normals_;
  int64_t size_ = 0;
};

class Adder {
 public:
  explicit Adder(const LegacyNormal& noise)
      : n_(noise),
        threads_(std::max<int64_t>(1, torch::stable::get_num_threads())),
        twister_(noise.key, noise.position),
        parts_(static_cast<size_t>(threads_)) {}

  void run() {
    const int64_t total = n_.samples * n_.columns;
    // Four of five attempts are accepted; few words where few are wanted.
    attempts_ = std::clamp<int64_t>(total, 256, kAttempts);
    words_.resize(static_cast<size_t>(4 * attempts_));
    next_.resize(words_.size());
    twister_.fill(words_.data(), 4 * attempts_);
    for (int64_t row = 0; row < n_.samples;) {
      draw();
      gather();
      const int64_t rows =
          std::min(static_cast<int64_t>(line_.size()) / n_.columns, n_.samples - row);
      add(row, rows);
      line_.erase(line_.begin(), line_.begin() + rows * n_.columns);
      row += rows;
    }
  }

 private:
  static constexpr int64_t kAttempts = 1 << 17;

  // The attempts of this chunk, and the words of the next.
  void draw() {
    // What making words costs beside what attempts do, so that threads end together.
    constexpr double kWordsShare = 0.3;
    const double own =
        std::max(0.0, (1 + kWordsShare) / static_cast<double>(threads_) - kWordsShare);
    const int64_t head = threads_ == 1 ? attempts_ : static_cast<int64_t>(own * attempts_);
    const auto begin_of = [&](int64_t thread) {
      return thread == 0 ? 0 : head + (attempts_ - head) * (thread - 1) / (threads_ - 1);
    };
    torch::stable::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        const int64_t first = begin_of(thread);
        const int64_t last = thread + 1 == threads_ ? attempts_ : begin_of(thread + 1);
        parts_[static_cast<size_t>(thread)](words_.data() + 4 * first, last - first);
        if (thread == 0) twister_.fill(next_.data(), 4 * attempts_);
      }
    });
    words_.swap(next_);
  }

  // The normals of all threads behind what was left over.
  void gather() {
    for (const Attempts& part : parts_) {
      line_.insert(line_.end(), part.normals(), part.normals() + part.size());
    }
  }

  // To `rows` samples from `row` on, whose noise lies at the head of the line.
  void add(int64_t row, int64_t rows) {
    constexpr int64_t kTile = 16;  // of samples, two lines of a column
    torch::stable::parallel_for(0, n_.count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t m = 0; m < rows; m += kTile) {
        const int64_t last = std::min(m + kTile, rows);
        for (int64_t j = begin; j < end; ++j) {
          double* to = n_.values + j * n_.samples + row;
          const double weight = n_.weights[j];
          const double* from = line_.data() + n_.first + j;
          for (int64_t i = m; i < last; ++i) to[i] += weight * from[i * n_.columns];
        }
      }
    });
  }

  const LegacyNormal& n_;
  int64_t threads_, attempts_ = 0;
  Twister twister_;
  std::vector<Attempts> parts_;
  std::vector<uint32_t> words_, next_;
  std::vector<double> line_;
};

}  // namespace

void add_legacy_normal(const LegacyNormal& noise) { Adder(noise).run(); }

}  // namespace picnn_fast
