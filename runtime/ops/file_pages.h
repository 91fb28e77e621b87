// Pages of a mapped file that were read once, when weights were loaded, and are not needed
// resident.
#pragma once

#include <cstdint>

namespace edgelora::ops {

// Gives back the pages of [begin, begin + bytes) that are a file's: a later read gets them from the
// file again. Only those of which the system says so: the process's own memory keeps its contents,
// as does a page of a private mapping that was written to. Where the system cannot be asked (not
// Linux, no /proc), nothing happens. Nobody may write to these pages meanwhile.
void give_back_file_pages(const void* begin, int64_t bytes) noexcept;

}  // namespace edgelora::ops
