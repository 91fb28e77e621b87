// What a decode step will read in a moment and the stream of weights has pushed out of every cache
// since the last token: asked for early, and all at once, it is waited for once.
#pragma once

#include <cstdint>

namespace edgelora::ops {

inline constexpr int64_t kLineBytes = 64;

// `bytes` from `begin` on, to be read.
inline void prefetch(const void* begin, int64_t bytes) {
  const auto* line = static_cast<const char*>(begin);
  for (const char* end = line + bytes; line < end; line += kLineBytes)
    __builtin_prefetch(line, 0, 3);
}

// The line of `address`, to be written.
inline void prefetch_for_write(const void* address) { __builtin_prefetch(address, 1, 3); }

}  // namespace edgelora::ops
