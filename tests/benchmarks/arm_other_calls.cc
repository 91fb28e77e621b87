// Calls another project's product and nothing else, on the operands of arm_calls.cc. arm_others.py
// compiles it with each kernel: -include its header, -DFUNCTION=its name.
//
//   arm_other_calls ROWS CALLS
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <vector>

constexpr int kFeatures = 2048, kOutputs = 128, kBlock = 32, kBlocks = kFeatures / kBlock;
constexpr int kScale = 2, kBytesOfX = kBlock + kScale, kBytesOfW = kBlock / 2 + kScale;  // a block

using KleidiAi = void(size_t, size_t, size_t, size_t, const void*, const void*, float*, size_t,
                      size_t, float, float);
using Ggml = void(int, float*, size_t, const void*, const void*, int, int);
using GgmlDot = void(int, float*, size_t, const void*, size_t, const void*, size_t, int);

void call(KleidiAi* product, int rows, const uint8_t* x, const uint8_t* w, float* y) {
  constexpr float kMost = std::numeric_limits<float>::max();
  product(rows, kOutputs, kFeatures, kBlock, x, w, y, kOutputs * sizeof(float), sizeof(float),
          -kMost, kMost);
}

void call(Ggml* product, int rows, const uint8_t* x, const uint8_t* w, float* y) {
  product(kFeatures, y, kOutputs, w, x, rows, kOutputs);
}

void call(GgmlDot* product, int rows, const uint8_t* x, const uint8_t* w, float* y) {
  for (int row = 0; row < rows; ++row) {
    for (int output = 0; output < kOutputs; ++output) {
      product(kFeatures, y++, 0, w + output * kBlocks * kBytesOfW, 0,
              x + row * kBlocks * kBytesOfX, 0, 1);
    }
  }
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int rows = std::atoi(argv[1]);
  const std::vector<uint8_t> x(rows * kBlocks * kBytesOfX), w(kOutputs * kBlocks * kBytesOfW);
  std::vector<float> y(rows * kOutputs);
  for (int i = 0; i < std::atoi(argv[2]); ++i) call(FUNCTION, rows, x.data(), w.data(), y.data());
}
