// Which of a test's many cases are run: emulators and sanitizers are too slow for all of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace edgelora::test {

// One in about so many; EDGELORA_TEST_ONE_IN of the environment, else all.
inline size_t& one_case_in() {
  static size_t count = [] {
    const char* said = std::getenv("EDGELORA_TEST_ONE_IN");
    return said == nullptr ? size_t{1} : static_cast<size_t>(std::max(1, std::atoi(said)));
  }();
  return count;
}

// Asked once for each case in turn; *turn counts them.
inline bool left_out(size_t* turn) { return (*turn)++ % one_case_in() != 0; }

// How often to do the same again, of `all` times.
inline int64_t repeats(int64_t all) {
  const auto in = static_cast<int64_t>(one_case_in());
  return (all + in - 1) / in;
}

}  // namespace edgelora::test
