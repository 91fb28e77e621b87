// A file mapped read-only into memory: clean pages that the system may drop and read again. It begins
// at a multiple of 2 MB, so that pages of that size can hold it.
// Replace such a file by renaming another over it; one that is shortened in place kills the process
// (SIGBUS) at the next read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace edgelora {

class MappedFile {
 public:
  // Throws Error(EDGELORA_BAD_FILE) if the path is no readable, non-empty regular file.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  int64_t size() const { return size_; }  // bytes

 private:
  size_t space_size() const;  // bytes

  const uint8_t* data_ = nullptr;
  int64_t size_ = 0;
  void* space_ = nullptr;  // addresses that the mapping lies in
};

}  // namespace edgelora
