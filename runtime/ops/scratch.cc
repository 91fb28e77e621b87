#include "ops/scratch.h"

#include <cstdlib>

namespace edgelora::ops {
namespace {

constexpr int64_t kAlignment = 64;

class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* at_least(int64_t bytes) {
    if (bytes > capacity_) grow(bytes);
    return data_;
  }

 private:
  void grow(int64_t bytes) {
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
    const int64_t rounded = (bytes + bytes / 4 + kAlignment) / kAlignment * kAlignment;
    data_ = std::aligned_alloc(kAlignment, static_cast<size_t>(rounded));
    if (data_ != nullptr) capacity_ = rounded;
  }

  void* data_ = nullptr;
  int64_t capacity_ = 0;  // bytes
};

// A global by need: whoever runs the session calls us on a thread of its own, with no place to keep
// memory for it, and a decode step makes hundreds of calls that must not allocate.
thread_local Buffer buffers[3];  // by use

}  // namespace

void* scratch(ScratchUse use, int64_t bytes) noexcept {
  return buffers[static_cast<int>(use)].at_least(bytes > 0 ? bytes : 1);
}

}  // namespace edgelora::ops
