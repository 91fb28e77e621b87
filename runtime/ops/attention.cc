// edgelora::Attention: rotary embedding, kv_cache and grouped-query attention of q, k and v.
#include "ops/attention_part.h"

namespace edgelora::ops {
namespace {

enum InputIndex : size_t { kQuery = 0, kKey, kValue, kPart };

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kBytes = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr Input kInputs[] = {
    {kFloat, INPUT_OUTPUT_REQUIRED},                               // q ‖ k ‖ v, or q
    {kFloat, INPUT_OUTPUT_OPTIONAL},                               // k
    {kFloat, INPUT_OUTPUT_OPTIONAL},                               // v
    {kBytes, INPUT_OUTPUT_REQUIRED},                               // past_key
    {kBytes, INPUT_OUTPUT_REQUIRED},                               // past_value
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, INPUT_OUTPUT_REQUIRED},  // last position
    {kFloat, INPUT_OUTPUT_REQUIRED},                               // cos
    {kFloat, INPUT_OUTPUT_REQUIRED},                               // sin
    {kFloat, INPUT_OUTPUT_OPTIONAL},                               // q_norm
    {kFloat, INPUT_OUTPUT_OPTIONAL},                               // k_norm
};

class Attention : public NodeKernel {
 public:
  Attention(const Shared& shared, const NodeInfo& node)
      : api_(*shared.api), part_(shared, node, kPart), packed_(!node.has_input(kKey)) {
    if (packed_ != !node.has_input(kValue)) {
      throw Error(EDGELORA_BAD_FILE, "k and v come together or packed with q");
    }
  }

  void compute(OrtKernelContext* context) const override {
    const int64_t q_width = part_.q_width(), kv_width = part_.kv_width();
    const Tensor q =
        read_rows(api_, context, kQuery, "q", packed_ ? q_width + 2 * kv_width : q_width);
    Shape shape = q.shape;
    shape.dims[2] = q_width;
    AttentionRun run =
        part_.packed_run(static_cast<const float*>(q.data), float_output(api_, context, shape),
                         shape.dims[0], shape.dims[1]);
    if (!packed_) {
      run.q.stride = q_width;
      run.k = {other_rows(context, kKey, "k", q.shape), kv_width};
      run.v = {other_rows(context, kValue, "v", q.shape), kv_width};
    }
    part_.run(part_.open(context, run.batch, run.sequence), run);
  }

 private:
  const float* other_rows(const OrtKernelContext* context, size_t index, const char* what,
                          const Shape& q) const {
    const Tensor rows = read_rows(api_, context, index, what, part_.kv_width());
    if (rows.shape.dims[0] == q.dims[0] && rows.shape.dims[1] == q.dims[1]) {
      return static_cast<const float*>(rows.data);
    }
    throw Error(EDGELORA_INVALID_ARGUMENT, std::string(what) + " is " + to_string(rows.shape) +
                                               ", q is " + to_string(q));
  }

  const OrtApi& api_;
  const AttentionPart part_;
  const bool packed_;
};

std::unique_ptr<NodeKernel> create(const Shared& shared, const NodeInfo& node) {
  return std::make_unique<Attention>(shared, node);
}

}  // namespace

const Schema kAttentionSchema{"Attention",    kInputs, std::size(kInputs),
                              kDecoderOutputs, std::size(kDecoderOutputs), create};

}  // namespace edgelora::ops
