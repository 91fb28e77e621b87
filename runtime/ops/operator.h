// An operator: its schema, what all nodes of a registration share, and the raw OrtCustomOp that
// ONNX Runtime calls.
#pragma once

#include <memory>

#include "kernels/kernels.h"
#include "ops/crew.h"
#include "ops/ort.h"
#include "ops/registration.h"

namespace edgelora::ops {

// Two ONNX Runtimes may live in one process: the api belongs to the registration, never to a
// global.
struct Shared {
  const OrtApi* api;
  const kernels::KernelTable* kernels;
  bool exact;
  Crews* crews;  // of the registration, which lives as long as the process
};

// One node. compute is called by several threads at once.
class NodeKernel {
 public:
  virtual ~NodeKernel() = default;
  virtual void compute(OrtKernelContext* context) const = 0;
};

struct Input {
  ONNXTensorElementDataType type;  // UNDEFINED: any, checked at creation
  OrtCustomOpInputOutputCharacteristic presence;
};

struct Schema {
  const char* name;
  const Input* inputs;
  size_t input_count;
  const ONNXTensorElementDataType* outputs;
  size_t output_count;
  std::unique_ptr<NodeKernel> (*create)(const Shared& shared, const NodeInfo& node);
};

inline constexpr ONNXTensorElementDataType kFloatOutput[] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT};

// y, present_key, present_value
inline constexpr ONNXTensorElementDataType kDecoderOutputs[] = {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8};

extern const Schema kAttentionSchema;
extern const Schema kEmbeddingSchema;
extern const Schema kLayerSchema;
extern const Schema kLinearSchema;
extern const Schema kSwiGluSchema;

struct Operator : OrtCustomOp {
  Operator(const Schema& schema, const Shared& shared);

  const Schema* schema;
  Shared shared;
};

}  // namespace edgelora::ops
