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

constexpr size_t kHugePage = size_t{2} << 20;

// The first multiple of kHugePage from here on.
void* aligned(void* address) {
  const auto from = reinterpret_cast<uintptr_t>(address);
  return reinterpret_cast<void*>((from + kHugePage - 1) / kHugePage * kHugePage);
}

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
  space_ = mmap(nullptr, space_size(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (space_ == MAP_FAILED) refuse(path);
  const auto bytes = static_cast<size_t>(size_);
  void* data = mmap(aligned(space_), bytes, PROT_READ, MAP_PRIVATE | MAP_FIXED, file.get(), 0);
  if (data == MAP_FAILED) {
    munmap(space_, space_size());
    refuse(path);
  }
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);  // what is read from the disk comes in such pages, if the system has them
#endif
  data_ = static_cast<const uint8_t*>(data);
}

MappedFile::~MappedFile() { munmap(space_, space_size()); }

size_t MappedFile::space_size() const { return static_cast<size_t>(size_) + kHugePage; }

}  // namespace edgelora
