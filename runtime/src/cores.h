// How many threads to compute with: one for each performance core that this process may use.
#pragma once

#include <string>
#include <vector>

namespace edgelora {

// What the system says about one CPU that this process may run on.
struct Cpu {
  std::string siblings;  // of the same physical core, as the system writes them; empty: unknown
  double capacity;       // relative speed; 0: unknown
  double slow_below;  // an efficiency core has less than this share of the fastest one's capacity
};

// Pure. Physical cores that are not efficiency cores, at least 1, at most `limit`.
int performance_cores(const std::vector<Cpu>& cpus, int limit);

// Of this machine and process: affinity, SMT, big.LITTLE and a container's CPU quota counted in.
int performance_cores();

// CPUs that this process may compute on at once, SMT siblings included, at least 1: affinity and
// a container's CPU quota counted in.
int available_cpus();

}  // namespace edgelora
