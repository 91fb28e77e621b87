// Work shared by the session's threads: numbered tickets, handed out in order, each run once.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#include "ops/ort.h"

namespace edgelora::ops {

// Runs body(0) … body(count − 1), on up to `threads` threads of the session's pool, and returns
// when all are done. A ticket is handed out only after all smaller ones: body(i) may wait for a
// smaller one that waits for none, and no deadlock can follow. body must not throw.
template <typename Body>
void run_tickets(const OrtApi& api, const OrtKernelContext* context, int64_t threads, int64_t count,
                 Body& body) {
  struct Work {
    Body& body;
    int64_t count;
    std::atomic<int64_t> next{0};

    static void run(void* self, size_t) {
      Work& work = *static_cast<Work*>(self);
      for (;;) {
        const int64_t ticket = work.next.fetch_add(1, std::memory_order_relaxed);
        if (ticket >= work.count) return;
        work.body(ticket);
      }
    }
  } work{body, count};
  const int64_t workers = std::min(threads, count);
  if (workers <= 1) return Work::run(&work, 0);
  check(api,
        api.KernelContext_ParallelFor(context, &Work::run, static_cast<size_t>(workers), 0, &work));
}

// Tickets of one kind, for others to wait for.
class Stage {
 public:
  // Before any ticket runs.
  void expect(int64_t count) { pending_.store(count, std::memory_order_relaxed); }

  void finish_one() { pending_.fetch_sub(1, std::memory_order_release); }

  // Only for tickets after those of the stage (see run_tickets). They are short and run right now,
  // so this spins.
  void wait() const {
    for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins > kSpins) std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpins = 1000;
  std::atomic<int64_t> pending_{0};
};

}  // namespace edgelora::ops
