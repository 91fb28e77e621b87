#include "ops/operator.h"

namespace edgelora::ops {
namespace {

const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

// What ONNX Runtime holds for one node.
struct Node {
  const OrtApi* api;
  std::string label;  // "edgelora.Linear /model/layers.0/q_proj"
  std::unique_ptr<NodeKernel> kernel;
};

// Runs `body`; whatever is wrong is told with the node's label.
template <typename Body>
void labelled(const std::string& label, Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    throw Error(error.status(), label + ": " + error.what());
  }
}

OrtStatus* create_kernel(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                         void** kernel) {
  return guarded(*api, [&] {
    const NodeInfo node_info(*api, info);
    auto node = std::make_unique<Node>();
    node->api = api;
    node->label = std::string("edgelora.") + self(op).schema->name + " " + node_info.name();
    labelled(node->label, [&] {
      Shared shared = self(op).shared;
      shared.api = api;
      node->kernel = self(op).schema->create(shared, node_info);
    });
    *kernel = node.release();
  });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Node& node = *static_cast<const Node*>(kernel);
  return guarded(*node.api,
                 [&] { labelled(node.label, [&] { node.kernel->compute(context); }); });
}

void set_types(OrtCustomOp* op) {
  op->GetName = [](const OrtCustomOp* o) { return self(o).schema->name; };
  op->GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op->GetInputTypeCount = [](const OrtCustomOp* o) { return self(o).schema->input_count; };
  op->GetInputType = [](const OrtCustomOp* o, size_t i) { return self(o).schema->inputs[i].type; };
  op->GetInputCharacteristic = [](const OrtCustomOp* o, size_t i) {
    return self(o).schema->inputs[i].presence;
  };
  op->GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op->GetOutputTypeCount = [](const OrtCustomOp* o) { return self(o).schema->output_count; };
  op->GetOutputType = [](const OrtCustomOp* o, size_t i) { return self(o).schema->outputs[i]; };
  op->GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op->GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  op->GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op->GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op->GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op->GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op->GetEndVersion = [](const OrtCustomOp*) { return 1; };
}

}  // namespace

Operator::Operator(const Schema& the_schema, const Shared& the_shared)
    : OrtCustomOp{}, schema(&the_schema), shared(the_shared) {
  version = ORT_API_VERSION;
  set_types(this);
  CreateKernelV2 = create_kernel;
  KernelComputeV2 = compute;
  KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
}

}  // namespace edgelora::ops
