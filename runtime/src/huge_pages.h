// Memory that pages of 2 MB can hold: looking up pages of 4 KB costs decode a part of its time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelora {

// Zeroed memory of its own that begins at a multiple of 2 MB; what is never touched takes none.
class HugePages {
 public:
  explicit HugePages(size_t bytes);  // throws std::bad_alloc
  ~HugePages();
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;

  uint8_t* data() const { return data_; }

 private:
  uint8_t* space_;  // that data_ lies in
  size_t size_;     // of the space, bytes
  uint8_t* data_;
};

// Asks for pages of 2 MB from `data` on, where the system has them.
void want_huge_pages(void* data, size_t bytes);

}  // namespace edgelora
