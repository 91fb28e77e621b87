// A file mapped read-only into memory: clean pages that the system may drop and read again.
// Replace such a file by renaming another over it; one that is shortened in place kills the process
// (SIGBUS) at the next read.
#pragma once

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
  const uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace edgelora
