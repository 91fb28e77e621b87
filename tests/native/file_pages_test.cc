// give_back_file_pages: a file's pages leave this process and come back with the same contents; all
// other memory is left alone.
#include "ops/file_pages.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include "test_check.h"

namespace {

using edgelora::ops::give_back_file_pages;

constexpr int64_t kPages = 600;  // more than are asked for at once

int64_t page_bytes() { return sysconf(_SC_PAGESIZE); }
int64_t size() { return kPages * page_bytes(); }

uint8_t expected(int64_t i) { return static_cast<uint8_t>(i * 7 + i / page_bytes()); }

std::string written(const edgelora::test::TemporaryFolder& folder) {
  std::vector<char> bytes(static_cast<size_t>(size()));
  for (int64_t i = 0; i < size(); ++i)
    bytes[static_cast<size_t>(i)] = static_cast<char>(expected(i));
  const std::string path = folder.file("weights");
  std::ofstream(path, std::ios::binary).write(bytes.data(), size());
  return path;
}

class Memory {
 public:
  Memory(int kind, int file)
      : data_(static_cast<uint8_t*>(mmap(nullptr, static_cast<size_t>(size()),
                                         PROT_READ | PROT_WRITE, kind, file, 0))) {
    if (data_ == MAP_FAILED) std::abort();
#ifdef MADV_NOHUGEPAGE  // a huge page leaves as a whole
    madvise(data_, static_cast<size_t>(size()), MADV_NOHUGEPAGE);
#endif
  }
  ~Memory() { munmap(data_, static_cast<size_t>(size())); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  uint8_t* data() const { return data_; }

  // Reads every page.
  bool holds(int64_t changed = -1) const {
    bool same = true;
    for (int64_t i = 0; i < size(); ++i) {
      const auto change = static_cast<uint8_t>(i == changed ? 1 : 0);
      same = same && data_[i] == static_cast<uint8_t>(expected(i) + change);
    }
    return same;
  }

 private:
  uint8_t* data_;
};

// Whether the page of `address` is in this process's memory.
bool is_resident(int pagemap, const uint8_t* address) {
  uint64_t word = 0;
  const int64_t page = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address)) / page_bytes();
  if (pread(pagemap, &word, sizeof(word), page * 8) != sizeof(word)) std::abort();
  return (word >> 63) != 0;
}

// Pages of it; −1 where the system does not tell.
int64_t resident(const Memory& memory) {
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) return -1;
  int64_t pages = 0;
  for (int64_t p = 0; p < kPages; ++p)
    pages += is_resident(pagemap, memory.data() + p * page_bytes());
  close(pagemap);
  return pages;
}

void a_files_pages_leave_and_come_back(int file) {
  const Memory memory(MAP_PRIVATE, file);
  CHECK(memory.holds());
  const int64_t all = resident(memory);
  if (all < 0) std::printf("the system does not tell pages: only contents are tested\n");
  CHECK(all < 0 || all == kPages);
  give_back_file_pages(memory.data() + 5, size() - 10);
  CHECK(all < 0 || resident(memory) == 0);
  CHECK(memory.holds());
}

void pages_outside_stay(int file) {
  const Memory memory(MAP_PRIVATE, file);
  CHECK(memory.holds());
  give_back_file_pages(memory.data() + 2 * page_bytes(), 3 * page_bytes());
  const int64_t left = resident(memory);
  CHECK(left < 0 || left == kPages - 3);
  CHECK(memory.holds());
}

void a_page_that_was_written_to_keeps_its_contents(int file) {
  const Memory memory(MAP_PRIVATE, file);
  const int64_t changed = 300 * page_bytes() + 17;
  ++memory.data()[changed];
  CHECK(memory.holds(changed));
  give_back_file_pages(memory.data(), size());
  CHECK(memory.holds(changed));
}

void own_memory_keeps_its_contents() {
  const Memory memory(MAP_PRIVATE | MAP_ANONYMOUS, -1);
  for (int64_t i = 0; i < size(); ++i) memory.data()[i] = expected(i);
  give_back_file_pages(memory.data(), size());
  CHECK(memory.holds());
}

}  // namespace

int main() {
  const edgelora::test::TemporaryFolder folder;
  const int file = open(written(folder).c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) std::abort();
  a_files_pages_leave_and_come_back(file);
  pages_outside_stay(file);
  a_page_that_was_written_to_keeps_its_contents(file);
  own_memory_keeps_its_contents();
  close(file);
  return edgelora::test::failures == 0 ? 0 : 1;
}
