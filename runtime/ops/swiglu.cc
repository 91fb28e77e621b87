// edgelora::SwiGlu: silu(gate) · up, where x = gate ‖ up.
#include "ops/operator.h"

namespace edgelora::ops {
namespace {

constexpr Input kInputs[] = {{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, INPUT_OUTPUT_REQUIRED}};

constexpr int64_t kValuesPerTicket = 8 * 1024;

class SwiGlu : public NodeKernel {
 public:
  explicit SwiGlu(const Shared& shared) : shared_(shared) {}

  void compute(OrtKernelContext* context) const override {
    const Tensor x = input(*shared_.api, context, 0);
    Shape shape = x.shape;
    if (shape.rank == 0 || shape.last() % 2 != 0) {
      throw Error(EDGELORA_INVALID_ARGUMENT,
                  "x is " + to_string(shape) + ", expected an even last dimension");
    }
    const int64_t n = shape.dims[shape.rank - 1] /= 2;
    float* y = float_output(*shared_.api, context, shape);
    const int64_t elements = shape.elements();
    if (elements > 0) run(static_cast<const float*>(x.data), elements / n, n, y);
  }

 private:
  void run(const float* x, int64_t rows, int64_t n, float* y) const {
    const int64_t group = std::max<int64_t>(1, kValuesPerTicket / n);  // rows of a ticket
    auto body = [&](int64_t ticket) {
      const int64_t end = std::min(rows, (ticket + 1) * group);
      for (int64_t m = ticket * group; m < end; ++m) {
        const float* gate = x + m * 2 * n;
        shared_.kernels->swiglu(gate, gate + n, n, y + m * n);
      }
    };
    shared_.crews->run(shared_.crews->threads(), (rows + group - 1) / group, body);
  }

  const Shared shared_;
};

std::unique_ptr<NodeKernel> create(const Shared& shared, const NodeInfo&) {
  return std::make_unique<SwiGlu>(shared);
}

}  // namespace

const Schema kSwiGluSchema{
    "SwiGlu", kInputs, std::size(kInputs), kFloatOutput, std::size(kFloatOutput), create};

}  // namespace edgelora::ops
