// Micro-benchmark of every ISA that runs here. Medians of interleaved repeats.
//   decode    few rows, weights from memory: GB/s beside a plain streaming read in the same run
//   warm      few rows, weights from a cache: GMAC/s, what the instructions alone allow
//   prefill   many rows: GMAC/s
//
//   kernels_bench [repeats [word …]]    only lines that have every word: kernels_bench 9 avx2 nf4
//                                       M=1 (scalar only if it is a word)
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/kernels.h"

namespace edgelora::kernels::bench {
namespace {

constexpr size_t kCold = size_t{192}
                         << 20;  // bytes a decode measurement walks: far beyond any cache

struct Aligned {
  explicit Aligned(size_t bytes)
      : memory(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)), std::free) {}
  std::unique_ptr<char, void (*)(void*)> memory;
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(memory.get());
  }
};

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Runs body(thread) on all threads at once and returns the seconds of the slowest.
double run_threads(int threads, const std::function<void(int)>& body) {
  std::atomic<int> waiting{0};
  std::vector<double> seconds(static_cast<size_t>(threads));
  const auto work = [&](int thread) {
    waiting.fetch_add(1);
    while (waiting.load() < threads) {
    }
    const double begin = cpu_seconds();
    body(thread);
    seconds[static_cast<size_t>(thread)] = cpu_seconds() - begin;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& thread : others) thread.join();
  return *std::max_element(seconds.begin(), seconds.end());
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<long>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

// Sums 64-bit words with eight accumulators: as fast as the machine reads.
double stream_seconds(const Aligned& memory, size_t bytes, int threads) {
  std::atomic<uint64_t> sink{0};
  return run_threads(threads, [&](int thread) {
    const size_t words = bytes / 8 / static_cast<size_t>(threads) / 8 * 8;
    const uint64_t* from = memory.as<uint64_t>() + words * static_cast<size_t>(thread);
    uint64_t sums[8] = {};
    for (size_t i = 0; i < words; i += 8) {
      for (size_t j = 0; j < 8; ++j) sums[j] += from[i + j];
    }
    for (uint64_t sum : sums) sink += sum;
  });
}

struct Shape {
  const char* name;
  int64_t in_features, out_features;
};

struct Kind {
  const char* name;
  Format format;
  int64_t block_size;
};

// A linear of one shape; copies of it fill `kCold` bytes so that decode never finds it in a cache
// (`cold` 0: one copy; a further copy is the same again).
class Linear {
 public:
  Linear(const Kind& kind, const Shape& shape, size_t cold)
      : panels_((shape.out_features + 15) / 16),
        code_bytes_(static_cast<size_t>(panels_ * 16 * shape.in_features) /
                    (kind.format == Format::kInt8 ? 1 : 2)),
        scale_count_(static_cast<size_t>(panels_ * 16 * shape.in_features / kind.block_size)),
        copies_(std::max<size_t>(1, cold / code_bytes_)),
        codes_(code_bytes_ * copies_),
        scales_(scale_count_ * 2 * copies_),
        zero_points_(scale_count_ * 2 * copies_),
        slice_(shape.out_features),
        weights_{kind.format,
                 shape.in_features,
                 shape.out_features,
                 kind.block_size,
                 nullptr,
                 0,
                 0,
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr,
                 Rounding::kNone,
                 1.0f,
                 &slice_,
                 1} {
    std::memset(codes_.as<char>(), 0x5a, code_bytes_ * copies_);
    for (size_t i = 0; i < scale_count_ * copies_; ++i) scales_.as<uint16_t>()[i] = 0x2400;
    std::memset(zero_points_.as<char>(), 0x22, scale_count_ * 2 * copies_);
  }

  size_t copies() const { return copies_; }
  int64_t panels() const { return panels_; }

  Weights copy(size_t i) const {
    i %= copies_;
    Weights w = weights_;
    w.codes = codes_.as<char>() + i * code_bytes_;
    w.scales = scales_.as<uint16_t>() + i * scale_count_;
    const size_t extra = w.format == Format::kInt4Offsets ? 2 * scale_count_ : scale_count_ / 2;
    if (w.format == Format::kInt4ZeroPoints || w.format == Format::kInt4Offsets) {
      w.zero_points = zero_points_.as<char>() + i * extra;
    }
    return w;
  }

  double bytes() const {  // that one pass over the weights reads
    const auto scales = static_cast<double>(scale_count_);
    const double each = weights_.format == Format::kInt4ZeroPoints ? 2.5
                        : weights_.format == Format::kInt4Offsets    ? 4.0
                                                                     : 2.0;
    return static_cast<double>(code_bytes_) + scales * each;
  }

 private:
  int64_t panels_;
  size_t code_bytes_, scale_count_, copies_;
  Aligned codes_, scales_, zero_points_;
  int64_t slice_;
  Weights weights_;
};

// grouped: as quantize_groups leaves them, here with one scale for all.
struct Rows {
  Rows(int64_t rows, int64_t in_features, bool grouped)
      : codes(static_cast<size_t>(rows * in_features), 3),
        scales(static_cast<size_t>(rows * in_features / 32), 0.01f),
        sums(static_cast<size_t>(rows * in_features / 32), 96),
        view{rows, codes.data(), scales.data(), sums.data(), false, grouped} {}
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  Activations view;
};

// Every thread takes its share of the panels of each copy.
double linear_seconds(const KernelTable& table, const Linear& linear, const Rows& x, size_t copies,
                      int threads) {
  const int64_t n = linear.copy(0).out_features;
  std::vector<float> y(static_cast<size_t>(n * x.view.rows));
  const auto scratch = static_cast<size_t>(linear_scratch_bytes(linear.copy(0)));
  std::vector<Aligned> scratches;
  for (int i = 0; i < threads; ++i) scratches.emplace_back(scratch);
  return run_threads(threads, [&](int thread) {
    const int64_t begin = linear.panels() * thread / threads;
    const int64_t end = linear.panels() * (thread + 1) / threads;
    for (size_t i = 0; i < copies; ++i) {
      table.linear(linear.copy(i), x.view, begin, end, y.data(), n,
                   scratches[static_cast<size_t>(thread)].as<char>());
    }
  });
}

// What the command line asked for.
struct Wish {
  int repeats;
  std::vector<std::string> words;

  bool has(const std::string& word) const {
    return std::find(words.begin(), words.end(), word) != words.end();
  }
  bool covers(const std::string& line) const {  // each word as a whole word of the line
    return std::all_of(words.begin(), words.end(), [&](const std::string& word) {
      return (" " + line + " ").find(" " + word + " ") != std::string::npos;
    });
  }
};

std::string line_name(const char* what, const KernelTable& table, const Kind& kind,
                      const Shape& shape, int64_t rows) {
  return std::string(what) + " " + table.isa + " " + kind.name + " b" +
         std::to_string(kind.block_size) + " " + shape.name + " M=" + std::to_string(rows);
}

void bench_decode(const KernelTable& table, const Kind& kind, const Shape& shape, int64_t rows,
                  const Wish& wish) {
  const std::string name = line_name("decode", table, kind, shape, rows);
  if (!wish.covers(name)) return;
  const Linear linear(kind, shape, kCold);
  const Rows x(rows, shape.in_features, groups_scales(table, kind.format));
  Aligned stream(kCold);
  std::memset(stream.as<char>(), 1, kCold);
  std::printf("%-50s", name.c_str());
  for (int threads : {1, 2}) {
    std::vector<double> kernel, plain, ratio;
    for (int i = 0; i < wish.repeats; ++i) {
      plain.push_back(static_cast<double>(kCold) / stream_seconds(stream, kCold, threads) / 1e9);
      const auto copies = static_cast<double>(linear.copies());
      kernel.push_back(linear.bytes() * copies /
                       linear_seconds(table, linear, x, linear.copies(), threads) / 1e9);
      ratio.push_back(kernel.back() / plain.back());
    }
    std::printf("  %dt %6.1f GB/s of %6.1f (%3.0f %%)", threads, median(kernel), median(plain),
                100.0 * median(ratio));
  }
  std::printf("\n");
  std::fflush(stdout);
}

void bench_macs(const char* what, const KernelTable& table, const Kind& kind, const Shape& shape,
                int64_t rows, const Wish& wish) {
  const std::string name = line_name(what, table, kind, shape, rows);
  if (!wish.covers(name)) return;
  const Linear linear(kind, shape, 0);
  const Rows x(rows, shape.in_features, groups_scales(table, kind.format));
  const double macs = static_cast<double>(rows * shape.in_features * shape.out_features);
  const auto passes = static_cast<size_t>(1 + 2e8 / macs);
  std::printf("%-50s", name.c_str());
  for (int threads : {1, 2}) {
    std::vector<double> rate;
    for (int i = 0; i < wish.repeats; ++i) {
      const double seconds = linear_seconds(table, linear, x, passes, threads);
      rate.push_back(macs * static_cast<double>(passes) / seconds / 1e9);
    }
    std::printf("  %dt %6.1f GMAC/s (best %6.1f)", threads, median(rate),
                *std::max_element(rate.begin(), rate.end()));
  }
  std::printf("\n");
  std::fflush(stdout);
}

constexpr Kind kKinds[] = {
    {"int4", Format::kInt4, 32},
    {"int4", Format::kInt4, 128},
    {"int4+zp", Format::kInt4ZeroPoints, 32},
    {"int4+off", Format::kInt4Offsets, 32},
    {"int8", Format::kInt8, 32},
    {"nf4", Format::kNf4, 64},
    {"fp4", Format::kFp4, 64},
};
constexpr Shape kWarmShape = {"576x576", 576, 576};
constexpr Shape kDecodeShapes[] = {
    {"576x576", 576, 576},     {"576->3072", 576, 3072},     {"576->49152", 576, 49152},
    {"2048x2048", 2048, 2048}, {"2048->16384", 2048, 16384}, {"8192->2048", 8192, 2048},
};

void bench_table(const KernelTable& table, const Wish& wish) {
  for (const Kind& kind : kKinds) {
    for (const Shape& shape : kDecodeShapes) {
      const bool head = shape.out_features == 49152;  // an embedding is int8
      if (head && kind.format != Format::kInt8) continue;
      for (int64_t rows : {1, 2, 4, 8}) bench_decode(table, kind, shape, rows, wish);
    }
    for (int64_t rows : {1, 2, 4, 8}) bench_macs("warm", table, kind, kWarmShape, rows, wish);
  }
  for (const Kind& kind : kKinds) {
    for (const Shape& shape : {kDecodeShapes[1], kDecodeShapes[3], kDecodeShapes[5]}) {
      for (int64_t rows : {16, 128, 512}) bench_macs("prefill", table, kind, shape, rows, wish);
    }
  }
}

}  // namespace
}  // namespace edgelora::kernels::bench

int main(int argc, char** argv) {
  using namespace edgelora::kernels;
  const bench::Wish wish{argc > 1 ? std::max(1, std::atoi(argv[1])) : 5,
                         {argv + std::min(argc, 2), argv + argc}};
  const Features features = detect_features();
  for (int i = 0; isa_name(i) != nullptr; ++i) {
    const std::string name = isa_name(i);
    if (name == "scalar" && !wish.has(name)) continue;
    if (isa_supported(i, features)) {
      bench::bench_table(*select_kernels(features, isa_name(i)), wish);
    }
  }
}
