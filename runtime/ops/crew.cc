#include "ops/crew.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <system_error>
#include <utility>

#include "src/error.h"

namespace edgelora::ops {
namespace {

// Some 10 µs: longer than the waits within a decode step, which a system call would lengthen.
constexpr int kPausesBeforeYield = 1024;
constexpr auto kAwake = std::chrono::milliseconds(1);  // longer than what lies between two tokens

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // "yield" does nothing on most cores
#endif
}

// Waits in turns, after a while by giving the core to whoever else wants it: the thread that is
// waited for may be among them.
class Spin {
 public:
  // True in a turn that gave the core away.
  bool turn() {
    if (pauses_ < kPausesBeforeYield) {
      ++pauses_;
      pause();
      return false;
    }
    std::this_thread::yield();
    return true;
  }

 private:
  int pauses_ = 0;
};

// How long a helper spins.
class Awake {
 public:
  bool still() {
    if (!spin_.turn()) return true;  // not yet worth a look at the clock
    const auto now = std::chrono::steady_clock::now();
    if (since_ == std::chrono::steady_clock::time_point{}) since_ = now;
    return now - since_ < kAwake;
  }

 private:
  Spin spin_;
  std::chrono::steady_clock::time_point since_;
};

template <typename Condition>
void spin_until(Condition condition) {
  for (Spin spin; !condition();) spin.turn();
}

}  // namespace

Crew::Crew(int64_t helpers, bool spinning) : spinning_(spinning) {
  try {
    for (int64_t i = 0; i < helpers; ++i) threads_.emplace_back([this, i] { help(i); });
  } catch (const std::system_error& error) {
    stop();  // those that run must end before this does
    throw Error(EDGELORA_RUNTIME, "cannot start " + std::to_string(helpers) + " threads (" +
                                      error.what() + "): ask for fewer, or give this process more");
  } catch (...) {
    stop();
    throw;
  }
}

Crew::~Crew() { stop(); }

void Crew::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Crew::run(const Work& work, int64_t helpers) {
  work_ = work;
  helpers_ = helpers;
  next_.store(0, std::memory_order_relaxed);
  const uint64_t call = state_.load(std::memory_order_relaxed) / kCall + 1;
  state_.store(call * kCall | kOpen, std::memory_order_seq_cst);
  if (asleep_.load(std::memory_order_seq_cst) > 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  take_tickets();
  close();
}

// From here on nobody enters; who is inside still works.
void Crew::close() {
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  spin_until([&] { return (state_.load(std::memory_order_acquire) & kInside) == 0; });
}

void Crew::take_tickets() {
  for (;;) {
    const int64_t ticket = next_.fetch_add(1, std::memory_order_relaxed);
    if (ticket >= work_.tickets) return;
    work_.body(work_.object, ticket);
  }
}

void Crew::help(int64_t index) {
  for (uint64_t seen = 0;;) {
    const uint64_t call = await(seen);
    if (stopping_) return;
    seen = call;
    if (!enter(call)) continue;
    if (index < helpers_) take_tickets();
    state_.fetch_sub(1, std::memory_order_release);
  }
}

// The number of a call after `seen` that is open, or any number once the crew is stopping.
uint64_t Crew::await(uint64_t seen) {
  const auto fresh = [&](uint64_t state) {
    return (state & kOpen) != 0 && state / kCall != seen;
  };
  Awake awake;
  while (spinning_ && awake.still()) {
    const uint64_t state = state_.load(std::memory_order_acquire);
    if (fresh(state)) return state / kCall;
    if (stopping_.load(std::memory_order_relaxed)) return seen;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  asleep_.fetch_add(1, std::memory_order_seq_cst);
  wake_.wait(lock, [&] { return stopping_ || fresh(state_.load(std::memory_order_seq_cst)); });
  asleep_.fetch_sub(1, std::memory_order_seq_cst);
  return state_.load(std::memory_order_acquire) / kCall;
}

bool Crew::enter(uint64_t call) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while ((state & kOpen) != 0 && state / kCall == call) {
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
  }
  return false;
}

std::unique_ptr<Crew> Crews::borrow() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      std::unique_ptr<Crew> crew = std::move(idle_.back());
      idle_.pop_back();
      return crew;
    }
  }
  return std::make_unique<Crew>(threads_ - 1, spinning_);
}

void Crews::run_work(const Work& work, int64_t threads) {
  const int64_t workers = std::min({threads, threads_, work.tickets});
  if (workers <= 1) {
    for (int64_t ticket = 0; ticket < work.tickets; ++ticket) work.body(work.object, ticket);
    return;
  }
  std::unique_ptr<Crew> crew = borrow();
  crew->run(work, workers - 1);
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(crew));
}

void Stage::wait() const {
  spin_until([&] { return pending_.load(std::memory_order_acquire) == 0; });
}

}  // namespace edgelora::ops
