// edgelora::Embedding: rows of the packed matrix as float32.
#include "ops/operator.h"
#include "ops/packed_weights.h"

namespace edgelora::ops {
namespace {

enum InputIndex : size_t { kIds = 0, kCodes = 1 };

constexpr Input kInputs[] = {
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, INPUT_OUTPUT_REQUIRED},      // input_ids
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, INPUT_OUTPUT_REQUIRED},  // codes
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, INPUT_OUTPUT_OPTIONAL},  // scales
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, INPUT_OUTPUT_OPTIONAL},  // zero_points, offsets
};

constexpr int64_t kValuesPerTicket = 16 * 1024;

int64_t vocab_size(const NodeInfo& node) {
  const std::string format = node.text("format"), kind = format.substr(0, 3);
  if (kind == "nf4" || kind == "fp4") {
    throw Error(EDGELORA_BAD_FILE, "format is \"" + format + "\", expected int4, int8 or float");
  }
  return node.integer("out_features");
}

class Embedding : public NodeKernel {
 public:
  Embedding(const Shared& shared, const NodeInfo& node)
      : shared_(shared), packed_(node, kCodes, {vocab_size(node)}) {}

  void compute(OrtKernelContext* context) const override {
    const Tensor ids = input(*shared_.api, context, kIds);
    Shape shape = ids.shape;
    if (shape.rank != 2) {
      throw Error(EDGELORA_INVALID_ARGUMENT,
                  "input_ids is " + to_string(shape) + ", expected [batch, sequence]");
    }
    shape.dims[shape.rank++] = packed_.weights().in_features;
    const auto* tokens = static_cast<const int64_t*>(ids.data);
    const int64_t count = ids.shape.elements();
    check_ids(tokens, count);
    look_up(tokens, count, float_output(*shared_.api, context, shape));
  }

 private:
  void check_ids(const int64_t* tokens, int64_t count) const {
    const int64_t vocab_size = packed_.weights().out_features;
    for (int64_t i = 0; i < count; ++i) {
      if (tokens[i] >= 0 && tokens[i] < vocab_size) continue;
      throw Error(EDGELORA_INVALID_ARGUMENT, "token id " + std::to_string(tokens[i]) +
                                                 " is not in 0 to " +
                                                 std::to_string(vocab_size - 1));
    }
  }

  void look_up(const int64_t* tokens, int64_t count, float* out) const {
    const kernels::Weights& weights = packed_.weights();
    const int64_t k = weights.in_features;
    const int64_t rows = std::max<int64_t>(1, kValuesPerTicket / k);  // of a ticket
    auto body = [&](int64_t ticket) {
      const int64_t end = std::min(count, (ticket + 1) * rows);
      for (int64_t i = ticket * rows; i < end; ++i) {
        shared_.kernels->dequantize_row(weights, tokens[i], out + i * k);
      }
    };
    shared_.crews->run(shared_.crews->threads(), (count + rows - 1) / rows, body);
  }

  const Shared shared_;
  const PackedWeights packed_;
};

std::unique_ptr<NodeKernel> create(const Shared& shared, const NodeInfo& node) {
  return std::make_unique<Embedding>(shared, node);
}

}  // namespace

const Schema kEmbeddingSchema{
    "Embedding", kInputs, std::size(kInputs), kFloatOutput, std::size(kFloatOutput), create};

}  // namespace edgelora::ops
