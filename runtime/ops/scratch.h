// Memory for one call, reused by the next one on the same thread.
#pragma once

#include <cstdint>

namespace edgelora::ops {

// What the calling thread holds at once, for it also works as one of the crew: what passes between
// the steps of a layer, what a step shares among its tickets, what a ticket has for itself.
enum class ScratchUse { kLayer, kCall, kWorker };

// At least `bytes`, 64-byte aligned, contents undefined; valid until the thread asks again for the
// same use. Null when out of memory.
void* scratch(ScratchUse use, int64_t bytes) noexcept;

// Hands out consecutive pieces of one allocation, each on a multiple of 64 bytes; counts only while
// it has none.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t begin = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + begin);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// Scratch for what layout(Pieces&) takes; it is called to count and then to place. False when out
// of memory.
template <typename Layout>
bool take_pieces(ScratchUse use, Layout&& layout) {
  Pieces counted(nullptr);
  layout(counted);
  void* memory = scratch(use, counted.bytes());
  if (memory == nullptr) return false;
  Pieces pieces(memory);
  layout(pieces);
  return true;
}

}  // namespace edgelora::ops
