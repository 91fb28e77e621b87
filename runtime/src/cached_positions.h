// Which positions a kv_cache holds, and which adapter computed each: shortened before what lies
// behind is written, lengthened once that is done, so that it is true after a run that failed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace edgelora {

// Which adapter is to compute each position.
struct WantedAdapters {
  static constexpr size_t kNever = std::numeric_limits<size_t>::max();

  int64_t before = 0;
  int64_t after = 0;
  size_t start = 0;  // the first position of `after`

  int64_t at(size_t position) const { return position < start ? before : after; }

  // Where the adapter of a position ends.
  size_t end_of(size_t position) const { return position < start ? start : kNever; }
};

class CachedPositions {
 public:
  size_t size() const { return spans_.empty() ? 0 : spans_.back().end; }

  // Whether the last position is another adapter's.
  bool ends_with_other_than(int64_t adapter) const {
    return !spans_.empty() && spans_.back().adapter != adapter;
  }

  // How many of the first positions are of whom `wanted` says.
  size_t agreeing(const WantedAdapters& wanted) const {
    size_t begin = 0;
    for (const Span& span : spans_) {
      if (wanted.at(begin) != span.adapter) return begin;
      const size_t end = wanted.end_of(begin);
      if (end < span.end && wanted.at(end) != span.adapter) return end;
      begin = span.end;
    }
    return begin;
  }

  // Forgets all positions from `end` on.
  void shorten(size_t end) {
    while (!spans_.empty() && begin_of_last() >= end) spans_.pop_back();
    if (size() > end) spans_.back().end = end;
  }

  // `adapter` has computed the positions from size() to `end`.
  void lengthen(size_t end, int64_t adapter) {
    if (spans_.empty() || spans_.back().adapter != adapter) spans_.push_back({end, adapter});
    spans_.back().end = end;
  }

 private:
  struct Span {
    size_t end;
    int64_t adapter;
  };

  size_t begin_of_last() const { return spans_.size() < 2 ? 0 : spans_[spans_.size() - 2].end; }

  std::vector<Span> spans_;  // one behind the other, from position 0 on
};

}  // namespace edgelora
