// edgelora::Linear: y = activation(dequantize(W)·n + Σᵢ weightᵢ·scalingᵢ·Bᵢ·(Aᵢ·n) + bias) + residual,
// where n is x, or its RMS norm.
#include <utility>

#include "ops/linear_job.h"
#include "ops/operator.h"
#include "ops/packed_weights.h"

namespace edgelora::ops {
namespace {

enum InputIndex : size_t { kX = 0, kAdapterIds = 1, kCodes = 2, kBias = 7, kNorm = 8, kResidual = 9 };

constexpr Input kInputs[] = {
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, INPUT_OUTPUT_REQUIRED},      // x
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, INPUT_OUTPUT_REQUIRED},      // adapter_ids
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, INPUT_OUTPUT_REQUIRED},  // codes
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, INPUT_OUTPUT_OPTIONAL},  // scales, nested_absmax
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, INPUT_OUTPUT_OPTIONAL},  // zero_points, absmax
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, INPUT_OUTPUT_OPTIONAL},      // absmax_offset
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, INPUT_OUTPUT_OPTIONAL},      // absmax_table
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, INPUT_OUTPUT_OPTIONAL},      // bias
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, INPUT_OUTPUT_OPTIONAL},      // norm
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, INPUT_OUTPUT_OPTIONAL},      // residual
};

std::vector<std::string> read_targets(const NodeInfo& node, size_t count) {
  const std::string joined = node.text("targets");
  std::vector<std::string> targets;
  for (size_t begin = 0; begin <= joined.size();) {
    const size_t comma = std::min(joined.find(',', begin), joined.size());
    targets.push_back(joined.substr(begin, comma - begin));
    if (targets.back().empty()) throw Error(EDGELORA_BAD_FILE, "targets has an empty name");
    begin = comma + 1;
  }
  if (targets.size() != count) {
    throw Error(EDGELORA_BAD_FILE, "targets has " + std::to_string(targets.size()) +
                                       " names, slices has " + std::to_string(count));
  }
  return targets;
}

Activation read_activation(const NodeInfo& node, const kernels::Weights& weights) {
  const std::string name = node.text("activation");
  if (name == "none") return Activation::kNone;
  if (name != "swiglu") {
    throw Error(EDGELORA_BAD_FILE, "activation is \"" + name + "\", expected none or swiglu");
  }
  const int64_t* slices = weights.slices;
  if (weights.slice_count != 2 || slices[0] != slices[1]) {
    throw Error(EDGELORA_BAD_FILE, "swiglu needs two slices of one size: gate and up");
  }
  return Activation::kSwiGlu;
}

LinearNode read_node(const NodeInfo& node, const kernels::Weights& weights) {
  LinearNode read;
  read.norm = node.floats(kNorm, "norm", weights.in_features);
  read.epsilon = node.real("epsilon");
  read.bias = node.floats(kBias, "bias", weights.out_features);
  read.activation = read_activation(node, weights);
  return read;
}

class Linear : public Kernel {
 public:
  Linear(const Shared& shared, const NodeInfo& node)
      : shared_(shared),
        packed_(node, kCodes, node.integers("slices")),
        node_(read_node(node, packed_.weights())),
        has_residual_(node.has_input(kResidual)),
        cache_(read_targets(node, static_cast<size_t>(packed_.weights().slice_count)), slices(),
               packed_.weights().in_features) {}

  void compute(OrtKernelContext* context) const override {
    const Tensor x = input(*shared_.api, context, kX);
    const Tensor ids = input(*shared_.api, context, kAdapterIds);
    check_inputs(x.shape, ids.shape);
    Shape shape = x.shape;
    shape.dims[2] = columns();
    const float* residual = read_residual(context, shape);
    float* y = float_output(*shared_.api, context, shape);
    if (x.shape.elements() == 0) return;
    const Adapters adapters(cache_, ids);
    run(x, residual, y, adapters.rows);
  }

 private:
  // This thread's list, reused so that decoding does not allocate, and emptied so that no adapter
  // stays in memory.
  struct Adapters {
    Adapters(AdapterCache& cache, const Tensor& ids) : rows(of_thread()) {
      rows.resolve(cache, static_cast<const int64_t*>(ids.data), ids.shape.dims[0]);
    }
    ~Adapters() { rows.release(); }
    static RowAdapters& of_thread() {
      thread_local RowAdapters adapters;
      return adapters;
    }
    RowAdapters& rows;
  };

  std::vector<int64_t> slices() const {
    const kernels::Weights& weights = packed_.weights();
    return {weights.slices, weights.slices + weights.slice_count};
  }

  void check_inputs(const Shape& x, const Shape& ids) const {
    const int64_t k = packed_.weights().in_features;
    if (x.rank != 3 || x.dims[2] != k) {
      throw Error(
          EDGELORA_INVALID_ARGUMENT,
          "x is " + to_string(x) + ", expected [batch, sequence, " + std::to_string(k) + "]");
    }
    if (ids.rank != 1 || ids.dims[0] != x.dims[0]) {
      throw Error(EDGELORA_INVALID_ARGUMENT, "adapter_ids is " + to_string(ids) + ", expected [" +
                                                 std::to_string(x.dims[0]) + "]");
    }
  }

  int64_t columns() const {
    const int64_t n = packed_.weights().out_features;
    return node_.activation == Activation::kSwiGlu ? n / 2 : n;
  }

  const float* read_residual(const OrtKernelContext* context, const Shape& shape) const {
    if (!has_residual_) return nullptr;
    const Tensor residual = input(*shared_.api, context, kResidual);
    if (residual.shape == shape) return static_cast<const float*>(residual.data);
    throw Error(EDGELORA_INVALID_ARGUMENT, "residual is " + to_string(residual.shape) +
                                               ", expected " + to_string(shape));
  }

  void run(const Tensor& x, const float* residual, float* y, const RowAdapters& adapters) const {
    const kernels::Weights& weights = packed_.weights();
    LinearCall call{};
    call.kernels = shared_.kernels;
    call.weights = &weights;
    call.exact = shared_.exact || weights.format == kernels::Format::kFloat;
    call.panels = packed_.panels();
    call.node = node_;
    call.x = static_cast<const float*>(x.data);
    call.residual = residual;
    call.y = y;
    call.rows = x.shape.dims[0] * x.shape.dims[1];
    call.sequence_length = x.shape.dims[1];
    call.adapters = &adapters;
    call.threads = shared_.crews->threads();
    LinearJob(call).run(shared_.crews);
  }

  const Shared shared_;
  const PackedWeights packed_;
  const LinearNode node_;
  const bool has_residual_;
  mutable AdapterCache cache_;  // guards itself
};

std::unique_ptr<Kernel> create(const Shared& shared, const NodeInfo& node) {
  return std::make_unique<Linear>(shared, node);
}

}  // namespace

const Schema kLinearSchema{"Linear", kInputs, std::size(kInputs), kFloatOutput, std::size(kFloatOutput),
                          create};

}  // namespace edgelora::ops
