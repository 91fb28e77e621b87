// Which positions a kv_cache holds, and which adapter computed each: shortened before what lies behind
// is written, lengthened once that is done, so that it is true after a run that failed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edgelora {

class CachedPositions {
 public:
  size_t size() const { return spans_.empty() ? 0 : spans_.back().end; }

  // Whether the last position is another adapter's.
  bool ends_with_other_than(int64_t adapter) const {
    return !spans_.empty() && spans_.back().adapter != adapter;
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
