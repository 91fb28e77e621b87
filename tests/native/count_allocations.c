// Counts the allocations that libedgelora asks for; preloaded before it. ONNX Runtime's own are not
// counted.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

static atomic_long allocations;
static __thread int counting;  // dladdr may allocate

long own_allocations(void) { return allocations; }

static void count(const void* caller) {
  if (counting) return;
  counting = 1;
  Dl_info where;
  if (dladdr(caller, &where) != 0 && strstr(where.dli_fname, "libedgelora") != NULL) ++allocations;
  counting = 0;
}

// Each in the place of the C library's, which it calls.
#define NEXT(function) dlsym(RTLD_NEXT, function)

static void* next_malloc(size_t size) {
  static void* (*next)(size_t);
  if (next == NULL) next = (void* (*)(size_t))NEXT("malloc");
  return next(size);
}

void* malloc(size_t size) {
  count(__builtin_return_address(0));
  return next_malloc(size);
}

void* _Znwm(size_t size) {  // operator new, whose memory operator delete gives to free
  count(__builtin_return_address(0));
  return next_malloc(size);
}

void* aligned_alloc(size_t alignment, size_t size) {
  static void* (*next)(size_t, size_t);
  if (next == NULL) next = (void* (*)(size_t, size_t))NEXT("aligned_alloc");
  count(__builtin_return_address(0));
  return next(alignment, size);
}
