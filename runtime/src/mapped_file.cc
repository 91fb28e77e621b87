#include "src/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "src/error.h"

namespace edgelora {
namespace {

class Descriptor {
 public:
  explicit Descriptor(const std::string& path) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// Reads errno first.
[[noreturn]] void refuse(const std::string& path) {
  const std::string reason = std::generic_category().message(errno);
  throw Error(EDGELORA_BAD_FILE, path + ": cannot be read (" + reason + "); check the path");
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const Descriptor file(path);
  struct stat status {};
  if (file.get() < 0 || fstat(file.get(), &status) != 0) refuse(path);
  if (!S_ISREG(status.st_mode) || status.st_size == 0) {
    throw Error(EDGELORA_BAD_FILE, path + ": is empty or no regular file; check the path");
  }
  size_ = status.st_size;
  const auto bytes = static_cast<size_t>(size_);
  space_.emplace(bytes);
  void* data = mmap(space_->data(), bytes, PROT_READ, MAP_PRIVATE | MAP_FIXED, file.get(), 0);
  if (data == MAP_FAILED) refuse(path);
  want_huge_pages(data, bytes);  // what is read from the disk comes in such
}

}  // namespace edgelora
