#include "ops/file_pages.h"

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#endif

namespace edgelora::ops {

#ifdef __linux__
namespace {

// /proc/self/pagemap: a word for each page (Linux, Documentation/admin-guide/mm/pagemap.rst). Bit
// 61 is clear for anonymous memory, among it the copies of private mappings that were written to.
constexpr uint64_t kPresent = uint64_t{1} << 63;
constexpr uint64_t kSwapped = uint64_t{1} << 62;
constexpr uint64_t kOfFile = uint64_t{1} << 61;  // or shared: the contents outlive the mapping
constexpr int64_t kWordsAtOnce = 256;

bool is_of_file(uint64_t word) {
  return (word & (kPresent | kSwapped | kOfFile)) == (kPresent | kOfFile);
}

// Runs of the file's pages among those from `page` on that the words are of.
void give_back_runs(const uint64_t* words, int64_t count, int64_t page, int64_t page_bytes) {
  for (int64_t i = 0; i < count;) {
    const uint64_t* begin = std::find_if(words + i, words + count, is_of_file);
    const uint64_t* end = std::find_if_not(begin, words + count, is_of_file);
    i = end - words;
    if (begin == end) continue;
    void* address = reinterpret_cast<void*>((page + (begin - words)) * page_bytes);
    madvise(address, static_cast<size_t>((end - begin) * page_bytes), MADV_DONTNEED);
  }
}

void give_back_pages(int pagemap, int64_t page, int64_t end, int64_t page_bytes) {
  uint64_t words[kWordsAtOnce];
  while (page < end) {
    const int64_t count = std::min(end - page, kWordsAtOnce);
    const auto bytes = static_cast<ssize_t>(count * 8);
    if (pread(pagemap, words, static_cast<size_t>(bytes), page * 8) != bytes) return;
    give_back_runs(words, count, page, page_bytes);
    page += count;
  }
}

}  // namespace

void give_back_file_pages(const void* begin, int64_t bytes) noexcept {
  const int64_t page_bytes = sysconf(_SC_PAGESIZE);
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin));
  const int64_t page = address / page_bytes, end = (address + bytes + page_bytes - 1) / page_bytes;
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) return;
  give_back_pages(pagemap, page, end, page_bytes);
  close(pagemap);
}
#else
void give_back_file_pages(const void*, int64_t) noexcept {}
#endif

}  // namespace edgelora::ops
