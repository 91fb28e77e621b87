// Memory for one call, reused by the next one on the same thread.
#pragma once

#include <cstdint>

namespace edgelora::ops {

// The calling thread also works as one of the crew's: its two uses must not share memory.
enum class ScratchUse { kCall, kWorker };

// At least `bytes`, 64-byte aligned, contents undefined; valid until the thread asks again for the
// same use. Null when out of memory.
void* scratch(ScratchUse use, int64_t bytes) noexcept;

}  // namespace edgelora::ops
