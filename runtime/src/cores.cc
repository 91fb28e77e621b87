#include "src/cores.h"

#include <algorithm>
#include <fstream>
#include <set>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace edgelora {
namespace {

constexpr int kMostThreads =
    16;  // more wait for each other longer than they help a model of edge size

#if defined(__linux__)

// cpu_capacity is measured work at full speed: little cores are near 0.3 to 0.6 of the big ones.
// Clock rates tell less: the favoured cores of one kind differ by some percent, little cores reach
// three quarters.
constexpr double kSlowCapacity = 0.65;
constexpr double kSlowClock = 0.8;

std::string read_line(const std::string& path) {
  std::string line;
  std::ifstream file(path);
  std::getline(file, line);
  return line;
}

double read_number(const std::string& path) {
  double value = 0;
  std::ifstream file(path);
  return file >> value ? value : 0;
}

Cpu read_cpu(int index) {
  const std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(index);
  const std::string siblings = read_line(folder + "/topology/thread_siblings_list");
  const double capacity = read_number(folder + "/cpu_capacity");
  if (capacity > 0) return {siblings, capacity, kSlowCapacity};
  return {siblings, read_number(folder + "/cpufreq/cpuinfo_max_freq"), kSlowClock};
}

std::vector<Cpu> allowed_cpus() {
  cpu_set_t allowed;
  std::vector<Cpu> cpus;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return cpus;
  for (int index = 0; index < CPU_SETSIZE; ++index) {
    if (CPU_ISSET(index, &allowed)) cpus.push_back(read_cpu(index));
  }
  return cpus;
}

// Whole CPUs of the control group's quota ("<quota> <period>" or "max <period>"), at most `most`;
// spinning beyond it would only be throttled.
int quota_limit(int most) {
  double quota = 0, period = 0;
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  if (!(file >> quota >> period) || period <= 0) return most;
  return static_cast<int>(std::clamp(quota / period, 1.0, static_cast<double>(most)));
}

#endif

}  // namespace

int performance_cores(const std::vector<Cpu>& cpus, int limit) {
  double fastest = 0;
  for (const Cpu& cpu : cpus) fastest = std::max(fastest, cpu.capacity);
  std::set<std::string> cores;
  int alone = 0;  // CPUs whose core is unknown
  for (const Cpu& cpu : cpus) {
    if (cpu.capacity < fastest * cpu.slow_below) continue;
    if (cpu.siblings.empty()) {
      ++alone;
    } else {
      cores.insert(cpu.siblings);
    }
  }
  return std::clamp(static_cast<int>(cores.size()) + alone, 1, limit);
}

int performance_cores() {
#if defined(__linux__)
  return performance_cores(allowed_cpus(), quota_limit(kMostThreads));
#else
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMostThreads);
#endif
}

int available_cpus() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) count = CPU_COUNT(&allowed);
  count = quota_limit(std::max(count, 1));
#endif
  return std::max(count, 1);
}

}  // namespace edgelora
