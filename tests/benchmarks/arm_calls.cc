// Calls one ISA's linear and nothing else: arm_kernels.py counts the instructions that calls take.
//
//   arm_calls ISA FORMAT ROWS CALLS      FORMAT: the number of kernels.h's enumerator
#include <cstdlib>
#include <vector>

#include "kernels/kernels.h"

using namespace edgelora::kernels;

constexpr int64_t kFeatures = 2048, kOutputs = 128;  // eight panels

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const auto format = static_cast<Format>(std::atoi(argv[2]));
  const int64_t rows = std::atoi(argv[3]);
  const KernelTable* table = select_kernels(detect_features(), argv[1]);
  if (table == nullptr) return 3;
  const std::vector<uint8_t> codes(kFeatures * kOutputs), absmax(kFeatures * kOutputs / 64);
  const std::vector<uint16_t> halves(kFeatures / 32 * kOutputs);
  const std::vector<float> nested(absmax.size() / 256), absmax_table(256);
  const float offset = 0.0f;
  Weights w{};
  w.format = format;
  w.in_features = kFeatures;
  w.out_features = kOutputs;
  w.block_size = format == Format::kNf4 ? 64 : 32;
  w.codes = codes.data();
  w.scales = halves.data();
  w.zero_points = halves.data();
  w.absmax = absmax.data();
  w.nested_absmax = nested.data();
  w.absmax_offset = &offset;
  w.absmax_table = absmax_table.data();
  w.slices = &kOutputs;
  w.slice_count = 1;
  const auto blocks = static_cast<size_t>(rows * kFeatures / 32);
  const std::vector<int8_t> x(blocks * 32);
  const std::vector<float> scales(blocks);
  const std::vector<int32_t> sums(blocks);
  std::vector<float> y(static_cast<size_t>(rows * kOutputs));
  const auto bytes = static_cast<size_t>((linear_scratch_bytes(w) + 63) / 64 * 64);
  void* scratch = std::aligned_alloc(64, bytes);
  const Activations activations{rows, x.data(), scales.data(), sums.data()};
  for (int call = 0; call < std::atoi(argv[4]); ++call) {
    table->linear(w, activations, 0, kOutputs / 16, y.data(), kOutputs, scratch);
  }
  std::free(scratch);
}
