// A file mapped read-only into memory.
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
