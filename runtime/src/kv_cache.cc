#include "src/kv_cache.h"

#include <string>

#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/mman.h>
#endif

#include "src/error.h"

namespace edgelora {
namespace {

// Zeroed pages that cost nothing until they are written; null if there is no room.
void* reserve(size_t bytes) {
#if defined(_WIN32)
  return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
#else
#if !defined(MAP_NORESERVE)
  constexpr int MAP_NORESERVE = 0;
#endif
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
#endif
}

void release(void* data, size_t bytes) {
#if defined(_WIN32)
  static_cast<void>(bytes);
  VirtualFree(data, 0, MEM_RELEASE);
#else
  munmap(data, bytes);
#endif
}

}  // namespace

KvCache::KvCache(const ManifestModel& model, int64_t context_length)
    : tensor_size_(static_cast<size_t>(int64_t{model.num_key_value_heads} * context_length *
                                       model.head_dim)),
      bytes_(static_cast<size_t>(model.kv_cache_bytes() * context_length)),
      data_(static_cast<float*>(reserve(bytes_))) {
  if (data_ == nullptr) {
    throw Error(EDGELORA_OUT_OF_MEMORY, "no room for a kv_cache of " + std::to_string(bytes_) +
                                            " bytes (" + std::to_string(context_length) +
                                            " positions); ask for a smaller context_length");
  }
}

KvCache::~KvCache() { release(data_, bytes_); }

}  // namespace edgelora
