// Consecutive items that several workers share: each has a run of its own and takes pieces from its
// front, so that what it reads is one stream; who has finished his own takes from the ends of the
// others'. A piece is half of what is left of the run: few are taken, for a taking waits until all
// that was stored is seen by everybody, and the last are small enough for all to end at once.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace edgelora::ops {

class Shares {
 public:
  struct Piece {
    int64_t begin, end;
  };

  struct Sizes {  // of pieces; what is left at the end may be less
    int64_t least, most;
  };

  // Before anybody takes. items < 2^32.
  void deal(int64_t items, int64_t workers, Sizes sizes) {
    runs_ = std::min(workers, kMostRuns);
    least_ = static_cast<uint64_t>(sizes.least);
    most_ = static_cast<uint64_t>(sizes.most);
    for (int64_t i = 0; i < runs_; ++i) {
      const auto begin = static_cast<uint64_t>(items * i / runs_);
      const auto end = static_cast<uint64_t>(items * (i + 1) / runs_);
      run_[i].range.store(begin << 32 | end, std::memory_order_relaxed);
    }
  }

  // False when nothing is left.
  bool take(int64_t worker, Piece* piece) {
    const int64_t own = worker % runs_;
    if (take_from(own, true, piece)) return true;
    for (int64_t i = 1; i < runs_; ++i) {
      if (take_from((own + i) % runs_, false, piece)) return true;
    }
    return false;
  }

 private:
  static constexpr int64_t kMostRuns = 64;
  struct alignas(64) Run {
    std::atomic<uint64_t> range;  // begin ‖ end
  };

  bool take_from(int64_t run, bool front, Piece* piece) {
    std::atomic<uint64_t>& range = run_[run].range;
    uint64_t seen = range.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t begin = seen >> 32, end = seen & 0xffffffffu;
      if (begin == end) return false;
      const uint64_t half = (end - begin + 1) / 2;
      const uint64_t count =
          std::min(std::clamp(half, least_, std::max(least_, most_)), end - begin);
      const uint64_t left = front ? (begin + count) << 32 | end : begin << 32 | (end - count);
      if (!range.compare_exchange_weak(seen, left, std::memory_order_relaxed)) continue;
      const uint64_t first = front ? begin : end - count;
      *piece = {static_cast<int64_t>(first), static_cast<int64_t>(first + count)};
      return true;
    }
  }

  int64_t runs_ = 1;
  uint64_t least_ = 1, most_ = 1;
  Run run_[kMostRuns];
};

}  // namespace edgelora::ops
