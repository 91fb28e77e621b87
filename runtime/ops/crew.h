// Threads that share one call's work with the caller: numbered tickets, handed out in order, each
// run once.
//
// Why not ORT's own pool: a hand-over there costs a decode step several microseconds and allocates;
// a step makes 150 of them. Here it is one atomic store, seen by helpers that still spin from the
// call before.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace edgelora::ops {

// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t kWorkPerThread = 32 * 1024;

// What the threads run: body(object, ticket) for each ticket. It must not throw.
struct Work {
  void (*body)(void* object, int64_t ticket);
  void* object;
  int64_t tickets;
};

// The helpers of one caller at a time. Nobody waits for a helper that has not taken part: one that
// is late, asleep or gone (after fork) costs nothing but its help.
class Crew {
 public:
  // spinning: helpers wait awhile for the next call before they sleep.
  // Throws Error if the system gives no threads.
  Crew(int64_t helpers, bool spinning);
  ~Crew();
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  // Returns when every ticket has been run, by this thread and at most `helpers` others.
  void run(const Work& work, int64_t helpers);

 private:
  void stop();
  void help(int64_t index);
  uint64_t await(uint64_t seen);
  bool enter(uint64_t call);
  void take_tickets();
  void close();

  // call number ‖ kOpen ‖ helpers inside
  static constexpr uint64_t kInside = 0xffff;
  static constexpr uint64_t kOpen = 0x10000;
  static constexpr uint64_t kCall = 0x20000;

  const bool spinning_;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  Work work_{};          // of the open call
  int64_t helpers_ = 0;  // that the open call wants
  std::atomic<bool> stopping_{false};
  std::atomic<int64_t> asleep_{0};
  std::mutex mutex_;  // for sleeping only
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

// Crews for calls that run at once; each call borrows one. Thread-safe.
class Crews {
 public:
  Crews(int64_t threads, bool spinning) : threads_(threads), spinning_(spinning) {}

  int64_t threads() const { return threads_; }

  // Runs body(0) … body(count − 1) on up to `threads` threads and returns when all are done. A
  // ticket is handed out only after all smaller ones: body(i) may wait for smaller ones, and no
  // deadlock can follow.
  template <typename Body>
  void run(int64_t threads, int64_t count, Body& body) {
    run_work(
        {[](void* object, int64_t ticket) { (*static_cast<Body*>(object))(ticket); }, &body, count},
        threads);
  }

 private:
  void run_work(const Work& work, int64_t threads);
  std::unique_ptr<Crew> borrow();

  const int64_t threads_;
  const bool spinning_;
  std::mutex mutex_;  // guards idle_
  std::vector<std::unique_ptr<Crew>> idle_;
};

// Items of one step, each done by who takes it, and waited for by who needs them all.
class Stage {
 public:
  // Before any is taken.
  void expect(int64_t count) {
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    pending_.store(count, std::memory_order_relaxed);
  }

  // False when none is left.
  bool take(int64_t* item) {
    if (next_.load(std::memory_order_relaxed) >= count_) return false;
    *item = next_.fetch_add(1, std::memory_order_relaxed);
    return *item < count_;
  }

  void finish_one() { pending_.fetch_sub(1, std::memory_order_release); }

  // Only when all are taken. They are short and done right now, so this spins, and gives the core
  // away only after a while.
  void wait() const;

 private:
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> pending_{0};
};

}  // namespace edgelora::ops
