// The crew: every ticket once, whoever calls, however many threads, asleep or awake. Plain memory
// is written in tickets and read afterwards: a build with -DSANITIZE=thread sees what is missing.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ops/crew.h"
#include "ops/shares.h"
#include "sample.h"
#include "src/error.h"
#include "test_check.h"

namespace edgelora::test {
namespace {

using ops::Crews;
using ops::Stage;
using namespace std::chrono_literals;

constexpr auto kAsleep = 60ms;  // long after helpers have given up spinning

// Counts in plain memory: a ticket that two threads run is a race, one that none runs stays 0.
struct Counting {
  std::vector<int> counts;
  explicit Counting(int64_t tickets) : counts(static_cast<size_t>(tickets), 0) {}
  void operator()(int64_t ticket) { ++counts[static_cast<size_t>(ticket)]; }
  bool once() const {
    for (const int count : counts) {
      if (count != 1) return false;
    }
    return true;
  }
};

bool run_once(Crews* crews, int64_t threads, int64_t tickets) {
  Counting counting(tickets);
  crews->run(threads, tickets, counting);
  return counting.once();
}

void test_every_ticket_runs_once(bool spinning) {
  for (int64_t threads = 1; threads <= 8; ++threads) {
    Crews crews(threads, spinning);
    for (int64_t call = 0; call < repeats(300); ++call) {
      for (const int64_t tickets : {0, 1, 2, 3, 7, 8, 9, 65}) {
        CHECK(run_once(&crews, threads, tickets));
      }
    }
    CHECK(run_once(&crews, threads, 20000));
  }
}

// Calls that want other numbers of threads, with bodies of other types and sizes, right behind each
// other: a helper that is late from one must not run a ticket of the next.
void test_calls_of_all_kinds_follow_each_other(bool spinning) {
  Crews crews(5, spinning);
  for (int64_t call = 0; call < repeats(5000); ++call) {
    const int64_t tickets = call * 7919 % 12;
    CHECK(run_once(&crews, 1 + call % 7, tickets));
    int64_t sum = 0;
    std::atomic<int64_t> total{0};
    auto adding = [&total](int64_t ticket) { total.fetch_add(ticket, std::memory_order_relaxed); };
    crews.run(5, tickets, adding);
    for (int64_t i = 0; i < tickets; ++i) sum += i;
    CHECK(total.load() == sum);
  }
}

// What tickets wrote is seen by the caller, and what it wrote before by them.
void test_results_are_seen() {
  Crews crews(4, true);
  std::vector<int64_t> from(64), to(64);
  for (int64_t call = 0; call < repeats(3000); ++call) {
    for (int64_t& value : from) value = call;
    auto copying = [&](int64_t ticket) {
      const auto i = static_cast<size_t>(ticket);
      to[i] = from[i] + ticket;
    };
    crews.run(4, 64, copying);
    for (int64_t i = 0; i < 64; ++i) CHECK(to[static_cast<size_t>(i)] == call + i);
  }
}

void test_callers_at_once_do_not_meet() {
  for (const int64_t threads : {2, 3}) {
    Crews crews(threads, true);
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
      callers.emplace_back([&crews, threads, i] {
        for (int64_t call = 0; call < repeats(1000); ++call) {
          CHECK(run_once(&crews, threads, (call + i) % 10));
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
  }
}

// No more threads than asked for take part, the caller among them.
void test_a_call_keeps_to_its_threads() {
  Crews crews(6, true);
  for (int64_t threads = 1; threads <= 6; ++threads) {
    for (int64_t call = 0; call < repeats(200); ++call) {
      std::mutex mutex;
      std::set<std::thread::id> seen;
      auto body = [&](int64_t) {
        const std::lock_guard<std::mutex> lock(mutex);
        seen.insert(std::this_thread::get_id());
      };
      crews.run(threads, 40, body);
      CHECK(static_cast<int64_t>(seen.size()) <= threads);
    }
  }
}

// Ticket 0 lasts until every other thread has a ticket of its own: none of them may sleep on.
void check_all_take_part(Crews* crews, int64_t threads) {
  std::atomic<int64_t> here{0};
  auto meeting = [&](int64_t) {
    here.fetch_add(1);
    for (int i = 0; i < 20000 && here.load() < threads; ++i) std::this_thread::sleep_for(1ms);
    CHECK(here.load() == threads);
  };
  crews->run(threads, threads, meeting);
}

void test_helpers_take_part_even_if_they_slept(bool spinning) {
  Crews crews(4, spinning);
  for (const int64_t threads : {4, 2, 3, 4}) {
    check_all_take_part(&crews, threads);
    check_all_take_part(&crews, threads);
    std::this_thread::sleep_for(kAsleep);
    check_all_take_part(&crews, threads);
  }
}

// Calls that come just when helpers go to sleep.
void test_a_call_meets_helpers_that_fall_asleep() {
  Crews crews(3, true);
  for (int call = 0; call < 300; ++call) {
    check_all_take_part(&crews, 3);
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(call * 5);
    while (std::chrono::steady_clock::now() < until) {
    }
  }
}

void test_crews_end_in_any_state(bool spinning) {
  for (int i = 0; i < 100; ++i) {
    { const ops::Crew unused(4, spinning); }
    Crews crews(5, spinning);
    CHECK(run_once(&crews, 5, i % 20));
  }
  for (int i = 0; i < 3; ++i) {
    Crews crews(5, spinning);
    CHECK(run_once(&crews, 5, 20));
    std::this_thread::sleep_for(kAsleep);
  }
}

// Tickets wait for smaller ones, and see what those wrote.
void test_stages_order_tickets() {
  for (int64_t threads = 1; threads <= 4; ++threads) {
    Crews crews(threads, true);
    for (int64_t call = 0; call < repeats(1000); ++call) {
      const int64_t first = call % 5, tickets = first + 8;
      Stage stage;
      std::vector<int64_t> written(5, 0);
      std::atomic<int64_t> wrong{0};
      stage.expect(first);
      auto body = [&](int64_t ticket) {
        if (ticket < first) {
          written[static_cast<size_t>(ticket)] = call + 1;
          return stage.finish_one();
        }
        stage.wait();
        for (int64_t i = 0; i < first; ++i) {
          if (written[static_cast<size_t>(i)] != call + 1) ++wrong;
        }
      };
      crews.run(threads, tickets, body);
      CHECK(wrong.load() == 0);
    }
  }
}

// After fork the helpers are gone; their caller's work is done all the same.
void test_a_fork_runs_without_its_helpers() {
  Crews crews(3, true);
  CHECK(run_once(&crews, 3, 10));
  std::this_thread::sleep_for(kAsleep);
  const pid_t child = fork();
  if (child == 0) {
    bool all = true;
    for (int call = 0; call < 100; ++call) all = all && run_once(&crews, 3, 10);
    _exit(all ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(run_once(&crews, 3, 10));
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__x86_64__)
// A sanitizer needs more address space than is left here, and qemu limits none.
void test_missing_threads_are_said() {}
#else
rlim_t address_space() {  // of this process, bytes
  rlim_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * static_cast<rlim_t>(sysconf(_SC_PAGESIZE));
}

void test_missing_threads_are_said() {
  rlimit before{};
  CHECK(getrlimit(RLIMIT_AS, &before) == 0);
  rlimit little = before;
  little.rlim_cur = address_space() + (rlim_t{40} << 20);  // a few stacks
  CHECK(setrlimit(RLIMIT_AS, &little) == 0);
  std::string message;
  try {
    const ops::Crew crew(64, true);
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(setrlimit(RLIMIT_AS, &before) == 0);
  CHECK(message.find("cannot start 64 threads (") == 0);
}
#endif

// A worker alone walks through his own run, then takes the others' from their ends.
void test_pieces_are_one_stream_then_stolen() {
  ops::Shares shares;
  shares.deal(20, 2, {2, 4});
  const std::vector<std::pair<int64_t, int64_t>> expected = {
      {10, 14}, {14, 17}, {17, 19}, {19, 20}, {6, 10}, {3, 6}, {1, 3}, {0, 1}};
  std::vector<std::pair<int64_t, int64_t>> taken;
  for (ops::Shares::Piece piece; shares.take(1, &piece);) {
    taken.emplace_back(piece.begin, piece.end);
  }
  CHECK(taken == expected);
}

// Every item once, with more workers than items or runs too.
void test_items_are_shared_out(int64_t items, int64_t workers, int64_t piece_items) {
  Crews crews(4, true);
  ops::Shares shares;
  shares.deal(items, workers, {1, piece_items});
  Counting counting(items);
  auto work = [&](int64_t worker) {
    for (ops::Shares::Piece piece; shares.take(worker, &piece);) {
      CHECK(piece.end - piece.begin <= piece_items);
      for (int64_t i = piece.begin; i < piece.end; ++i) counting(i);
    }
  };
  crews.run(4, workers, work);
  CHECK(counting.once());
}

void test_shares() {
  test_pieces_are_one_stream_then_stolen();
  for (int64_t round = 0; round < repeats(200); ++round) {
    for (const int64_t items : {0, 1, 7, 36, 3072}) {
      for (const int64_t workers : {1, 2, 4, 70}) {
        for (const int64_t piece : {1, 3, 100}) test_items_are_shared_out(items, workers, piece);
      }
    }
  }
}

}  // namespace
}  // namespace edgelora::test

int main() {
  using namespace edgelora::test;
  alarm(300);  // a ticket that is lost is a wait without end
  test_a_fork_runs_without_its_helpers();
  test_missing_threads_are_said();
  for (const bool spinning : {true, false}) {
    test_every_ticket_runs_once(spinning);
    test_calls_of_all_kinds_follow_each_other(spinning);
    test_helpers_take_part_even_if_they_slept(spinning);
    test_crews_end_in_any_state(spinning);
  }
  test_results_are_seen();
  test_callers_at_once_do_not_meet();
  test_a_call_keeps_to_its_threads();
  test_a_call_meets_helpers_that_fall_asleep();
  test_stages_order_tickets();
  test_shares();
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
