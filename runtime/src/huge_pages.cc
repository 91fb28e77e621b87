#include "src/huge_pages.h"

#include <sys/mman.h>

#include <new>

namespace edgelora {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

uint8_t* reserve(size_t bytes) {
  void* space =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (space == MAP_FAILED) throw std::bad_alloc();
  return static_cast<uint8_t*>(space);
}

// The first multiple of kHugePage from here on.
uint8_t* aligned(uint8_t* address) {
  return address + (kHugePage - reinterpret_cast<uintptr_t>(address) % kHugePage) % kHugePage;
}

}  // namespace

HugePages::HugePages(size_t bytes)
    : space_(reserve(bytes + kHugePage)), size_(bytes + kHugePage), data_(aligned(space_)) {
  want_huge_pages(data_, bytes);
}

HugePages::~HugePages() { munmap(space_, size_); }

void want_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);  // a wish: the answer does not matter
#endif
}

}  // namespace edgelora
