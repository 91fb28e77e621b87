// Memory for one call, reused by the next one on the same thread.
#pragma once

#include <cstdint>

namespace edgelora::ops {

// What the calling thread holds at once, for it also works as one of the crew: what passes between the steps
// of a layer, what a step shares among its tickets, what a ticket has for itself.
enum class ScratchUse { kLayer, kCall, kWorker };

// At least `bytes`, 64-byte aligned, contents undefined; valid until the thread asks again for the
// same use. Null when out of memory.
void* scratch(ScratchUse use, int64_t bytes) noexcept;

}  // namespace edgelora::ops
