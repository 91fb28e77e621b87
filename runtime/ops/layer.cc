// edgelora::Layer: one layer of a decoder, whose steps Linear and Attention are:
//   a = x + o_proj(attention(qkv_proj(norm(x))))
//   y = a + down_proj(swiglu(gate_up_proj(norm(a))))
// of all rows, or of those that are kept: others only enter the kv_cache.
//
// A node costs a decode step microseconds in the graph engine: five nodes a layer took a tenth of a
// token of SmolLM2-135M.
#include <algorithm>
#include <new>

#include "ops/attention_part.h"
#include "ops/linear_part.h"
#include "ops/scratch.h"

namespace edgelora::ops {
namespace {

enum InputIndex : size_t {
  kX = 0,
  kAdapterIds,
  kAttention,
  kQkv = kAttention + AttentionPart::kInputCount,
  kOutput = kQkv + LinearPart::kInputCount,
  kGateUp = kOutput + LinearPart::kInputCount,
  kDown = kGateUp + LinearPart::kInputCount,
  kKept = kDown + LinearPart::kInputCount,
};

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kBytes = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr auto kAnyType = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
constexpr auto kOptional = INPUT_OUTPUT_OPTIONAL;
#define EDGELORA_LINEAR_INPUTS                                                              \
  {kAnyType, INPUT_OUTPUT_REQUIRED}, {kAnyType, kOptional}, {kAnyType, kOptional},          \
      {kFloat, kOptional}, {kFloat, kOptional}, {kFloat, kOptional}, {kFloat, kOptional}
constexpr Input kInputs[] = {
    {kFloat, INPUT_OUTPUT_REQUIRED},                               // x
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, INPUT_OUTPUT_REQUIRED},  // adapter_ids
    {kBytes, INPUT_OUTPUT_REQUIRED},                               // past_key
    {kBytes, INPUT_OUTPUT_REQUIRED},                               // past_value
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, INPUT_OUTPUT_REQUIRED},  // last position
    {kFloat, INPUT_OUTPUT_REQUIRED},                               // cos
    {kFloat, INPUT_OUTPUT_REQUIRED},                               // sin
    {kFloat, kOptional},                                           // q_norm
    {kFloat, kOptional},                                           // k_norm
    EDGELORA_LINEAR_INPUTS,                                        // qkv: codes … norm, as Linear
    EDGELORA_LINEAR_INPUTS,                                        // o
    EDGELORA_LINEAR_INPUTS,                                        // gate_up
    EDGELORA_LINEAR_INPUTS,                                        // down
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, kOptional},              // rows to keep
};
#undef EDGELORA_LINEAR_INPUTS

class Layer : public NodeKernel {
 public:
  Layer(const Shared& shared, const NodeInfo& node)
      : api_(*shared.api),
        attention_(shared, node, kAttention),
        qkv_(linear(shared, node, {"qkv", kQkv, "none"})),
        output_(linear(shared, node, {"o", kOutput, "none"})),
        gate_up_(linear(shared, node, {"gate_up", kGateUp, "swiglu"})),
        down_(linear(shared, node, {"down", kDown, "none"})),
        keeps_(node.has_input(kKept)) {
    check_width("qkv", attention_.q_width() + 2 * attention_.kv_width(), qkv_.columns());
    check_width("o", attention_.q_width(), output_.in_features());
    check_width("o", qkv_.in_features(), output_.columns());
    check_width("gate_up", output_.columns(), gate_up_.in_features());
    check_width("down", gate_up_.columns(), down_.in_features());
    check_width("down", output_.columns(), down_.columns());
  }

  void compute(OrtKernelContext* context) const override {
    const Tensor x = read_rows(api_, context, kX, "x", qkv_.in_features());
    Shape shape = x.shape;
    const Tensor ids = read_adapter_ids(api_, context, kAdapterIds, shape.dims[0]);
    const int64_t rows = shape.dims[0] * shape.dims[1];
    const Kept kept = read_kept(context, shape.dims[1]);
    shape.dims[1] = kept.count;
    float* y = float_output(api_, context, shape);
    const Values values = take_values(std::max(rows, shape.dims[0] * kept.count));
    LinearRun linear{static_cast<const float*>(x.data), nullptr, values.wide, x.shape.dims[0],
                     x.shape.dims[1], static_cast<const int64_t*>(ids.data)};
    const auto caches = attention_.open(context, linear.batch, linear.sequence);
    if (rows == 1) prefetch();
    if (rows > 0) qkv_.run(linear);
    AttentionRun attention =
        attention_.packed_run(values.wide, values.attended, linear.batch, linear.sequence);
    attention.first_query = kept.first;
    attention_.run(caches, attention);
    const float* attended = values.attended;
    if (!kept.all) {
      gather(kept, linear, attended, attention_.q_width(), values.wide);
      gather(kept, linear, linear.x, output_.columns(), y);
      attended = values.wide;
      linear.x = y;
      linear.sequence = kept.count;
    }
    if (linear.batch * linear.sequence == 0) return;
    output_.run(from_to(linear, attended, linear.x, y));
    gate_up_.run(from_to(linear, y, nullptr, values.wide));
    down_.run(from_to(linear, values.wide, y, y));
  }

 private:
  struct Values {     // [rows, …]
    float* wide;      // q ‖ k ‖ v, later silu(gate)·up
    float* attended;  // heads; behind q ‖ k ‖ v, in the place of silu(gate)·up
  };

  struct Kept {           // rows of each sequence behind attention
    const int64_t* rows;  // [count]
    int64_t count;
    int64_t first;  // the smallest
    bool all;       // each once, in order
  };

  Kept read_kept(const OrtKernelContext* context, int64_t sequence) const {
    if (!keeps_) return {nullptr, sequence, 0, true};
    const Tensor tensor = input(api_, context, kKept);
    if (tensor.shape.rank != 1) {
      throw Error(EDGELORA_INVALID_ARGUMENT,
                  "the rows to keep are " + to_string(tensor.shape) + ", expected one dimension");
    }
    Kept kept{static_cast<const int64_t*>(tensor.data), tensor.shape.dims[0], sequence, true};
    kept.all = kept.count == sequence;
    for (int64_t i = 0; i < kept.count; ++i) {
      const int64_t row = kept.rows[i];
      if (row < 0 || row >= sequence) {
        throw Error(EDGELORA_INVALID_ARGUMENT, "row " + std::to_string(row) + " of " +
                                                   std::to_string(sequence) + " cannot be kept");
      }
      kept.first = std::min(kept.first, row);
      kept.all = kept.all && row == i;
    }
    return kept;
  }

  static void gather(const Kept& kept, const LinearRun& run, const float* from, int64_t width,
                     float* to) {
    for (int64_t b = 0; b < run.batch; ++b) {
      for (int64_t i = 0; i < kept.count; ++i) {
        std::copy_n(from + (b * run.sequence + kept.rows[i]) * width, width, to);
        to += width;
      }
    }
  }

  // What the later steps read first, while the first one streams its weights.
  void prefetch() const {
    for (const LinearPart* part : {&qkv_, &output_, &gate_up_, &down_}) part->prefetch();
  }

  struct Role {  // of a linear in the layer
    std::string name;
    size_t first;  // input
    std::string activation;
  };

  // Whatever is wrong is told with the part's name.
  static LinearPart linear(const Shared& shared, const NodeInfo& node, const Role& role) {
    const NodeInfo part = node.part(role.name + "_", role.first);
    try {
      check_activation(part.text("activation"), role.activation);
      return LinearPart(shared, part);
    } catch (const Error& error) {
      throw Error(error.status(), role.name + ": " + error.what());
    }
  }

  static void check_activation(const std::string& found, const std::string& expected) {
    if (found == expected) return;
    throw Error(EDGELORA_BAD_FILE, "activation is \"" + found + "\", expected " + expected);
  }

  static void check_width(const char* what, int64_t expected, int64_t found) {
    if (expected == found) return;
    throw Error(EDGELORA_BAD_FILE, std::string(what) + " has " + std::to_string(found) +
                                       " features where " + std::to_string(expected) +
                                       " are expected");
  }

  static LinearRun from_to(LinearRun run, const float* x, const float* residual, float* y) {
    run.x = x;
    run.residual = residual;
    run.y = y;
    return run;
  }

  Values take_values(int64_t rows) const {
    const int64_t wide = std::max(qkv_.columns() + attention_.q_width(), gate_up_.columns());
    auto* memory = static_cast<float*>(scratch(ScratchUse::kLayer, rows * wide * 4));
    if (memory == nullptr) throw std::bad_alloc();
    return {memory, memory + rows * qkv_.columns()};
  }

  const OrtApi& api_;
  const AttentionPart attention_;
  const LinearPart qkv_;
  const LinearPart output_;
  const LinearPart gate_up_;
  const LinearPart down_;
  const bool keeps_;  // some rows, else all
};

std::unique_ptr<NodeKernel> create(const Shared& shared, const NodeInfo& node) {
  return std::make_unique<Layer>(shared, node);
}

}  // namespace

const Schema kLayerSchema{"Layer",         kInputs, std::size(kInputs),
                          kDecoderOutputs, std::size(kDecoderOutputs), create};

}  // namespace edgelora::ops
