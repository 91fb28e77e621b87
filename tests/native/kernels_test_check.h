// Checks that count, and memory that ends at a page nobody may touch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace edgelora::kernels::test {

struct Counts {
  int64_t passed = 0;
  int64_t failed = 0;
  bool quiet = false;
};

inline Counts& counts() {
  static Counts all;
  return all;
}

// Every failure counts; the first twenty are printed.
#define KERNELS_CHECK(condition, ...)                             \
  do {                                                            \
    if (condition) {                                              \
      ++counts().passed;                                          \
    } else if (++counts().failed <= 20 && !counts().quiet) {      \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (false)

// `bytes` that end `slack` bytes before a page without access: slack 0 catches every over-read,
// an odd slack makes the address odd.
class GuardedBytes {
 public:
  explicit GuardedBytes(size_t bytes, size_t slack = 0) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = (bytes + slack + page - 1) / page * page + page;
    base_ = static_cast<char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + mapped_ - page, page, PROT_NONE) != 0) {
      std::perror("guard page");
      std::exit(2);
    }
    data_ = base_ + mapped_ - page - slack - bytes;
  }
  ~GuardedBytes() { munmap(base_, mapped_); }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  size_t size() const { return bytes_; }
  template <class T = void>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }

 private:
  size_t bytes_;
  size_t mapped_ = 0;
  char* base_ = nullptr;
  char* data_ = nullptr;
};

// A small deterministic generator (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
  int below(int end) { return static_cast<int>(bits() % static_cast<uint64_t>(end)); }
  int between(int low, int high) { return low + below(high - low + 1); }  // inclusive
  float unit() { return static_cast<float>(bits() >> 40) * 0x1p-24f; }    // [0, 1)
  float symmetric() { return 2.0f * unit() - 1.0f; }

 private:
  uint64_t state_;
};

}  // namespace edgelora::kernels::test
