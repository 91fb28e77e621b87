// edgelora::Linear: y = activation(dequantize(W)·n + Σᵢ weightᵢ·scalingᵢ·Bᵢ·(Aᵢ·n) + bias) +
// residual, where n is x, or its RMS norm.
#include "ops/linear_part.h"

namespace edgelora::ops {
namespace {

enum InputIndex : size_t {
  kX = 0,
  kAdapterIds,
  kPart,
  kResidual = kPart + LinearPart::kInputCount
};

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kAnyType = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
constexpr Input kInputs[] = {
    {kFloat, INPUT_OUTPUT_REQUIRED},                               // x
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, INPUT_OUTPUT_REQUIRED},  // adapter_ids
    {kAnyType, INPUT_OUTPUT_REQUIRED},                             // codes
    {kAnyType, INPUT_OUTPUT_OPTIONAL},                             // scales, nested_absmax
    {kAnyType, INPUT_OUTPUT_OPTIONAL},                             // zero_points, absmax
    {kFloat, INPUT_OUTPUT_OPTIONAL},                               // absmax_offset
    {kFloat, INPUT_OUTPUT_OPTIONAL},                               // absmax_table
    {kFloat, INPUT_OUTPUT_OPTIONAL},                               // bias
    {kFloat, INPUT_OUTPUT_OPTIONAL},                               // norm
    {kFloat, INPUT_OUTPUT_OPTIONAL},                               // residual
};

class Linear : public NodeKernel {
 public:
  Linear(const Shared& shared, const NodeInfo& node)
      : api_(*shared.api),
        part_(shared, node.part("", kPart)),
        has_residual_(node.has_input(kResidual)) {}

  void compute(OrtKernelContext* context) const override {
    const Tensor x = read_rows(api_, context, kX, "x", part_.in_features());
    const Tensor ids = read_adapter_ids(api_, context, kAdapterIds, x.shape.dims[0]);
    Shape shape = x.shape;
    shape.dims[2] = part_.columns();
    const float* residual = read_residual(context, shape);
    float* y = float_output(api_, context, shape);
    if (x.shape.elements() == 0) return;
    part_.run({static_cast<const float*>(x.data), residual, y, shape.dims[0], shape.dims[1],
               static_cast<const int64_t*>(ids.data)});
  }

 private:
  const float* read_residual(const OrtKernelContext* context, const Shape& shape) const {
    if (!has_residual_) return nullptr;
    const Tensor residual = input(api_, context, kResidual);
    if (residual.shape == shape) return static_cast<const float*>(residual.data);
    throw Error(EDGELORA_INVALID_ARGUMENT,
                "residual is " + to_string(residual.shape) + ", expected " + to_string(shape));
  }

  const OrtApi& api_;
  const LinearPart part_;
  const bool has_residual_;
};

std::unique_ptr<NodeKernel> create(const Shared& shared, const NodeInfo& node) {
  return std::make_unique<Linear>(shared, node);
}

}  // namespace

const Schema kLinearSchema{"Linear",     kInputs, std::size(kInputs),
                           kFloatOutput, std::size(kFloatOutput), create};

}  // namespace edgelora::ops
