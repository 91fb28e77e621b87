// A file mapped read-only into memory: clean pages that the system may drop and read again. It
// begins at a multiple of 2 MB, so that pages of that size can hold it.
// Replace such a file by renaming another over it; one that is shortened in place kills the process
// (SIGBUS) at the next read.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "src/huge_pages.h"

namespace edgelora {

class MappedFile {
 public:
  // Throws Error(EDGELORA_BAD_FILE) if the path is no readable, non-empty regular file.
  explicit MappedFile(const std::string& path);

  const uint8_t* data() const { return space_->data(); }
  int64_t size() const { return size_; }  // bytes

 private:
  std::optional<HugePages> space_;  // which the mapping replaces
  int64_t size_ = 0;
};

}  // namespace edgelora
