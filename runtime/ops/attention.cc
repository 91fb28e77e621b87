// edgelora::Attention: rotary embedding, kv_cache and grouped-query attention over a packed q ‖ k ‖ v.
#include <algorithm>
#include <vector>

#include "ops/attention_job.h"
#include "ops/operator.h"

namespace edgelora::ops {
namespace {

enum InputIndex : size_t {
  kQuery = 0,  // q ‖ k ‖ v, or q alone
  kKey,
  kValue,
  kPastKey,
  kPastValue,
  kLastPosition,
  kCos,
  kSin,
  kQueryNorm,
  kKeyNorm,
};
enum OutputIndex : size_t { kY = 0, kPresentKey, kPresentValue };

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kBytes = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr Input kInputs[] = {
    {kFloat, INPUT_OUTPUT_REQUIRED},                             // q ‖ k ‖ v, or q
    {kFloat, INPUT_OUTPUT_OPTIONAL},                             // k
    {kFloat, INPUT_OUTPUT_OPTIONAL},                             // v
    {kBytes, INPUT_OUTPUT_REQUIRED},                             // past_key
    {kBytes, INPUT_OUTPUT_REQUIRED},                             // past_value
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, INPUT_OUTPUT_REQUIRED},  // last position
    {kFloat, INPUT_OUTPUT_REQUIRED},                             // cos
    {kFloat, INPUT_OUTPUT_REQUIRED},                             // sin
    {kFloat, INPUT_OUTPUT_OPTIONAL},                             // q_norm
    {kFloat, INPUT_OUTPUT_OPTIONAL},                             // k_norm
};
constexpr ONNXTensorElementDataType kOutputs[] = {kFloat, kBytes, kBytes};

[[noreturn]] void refuse(const std::string& why) { throw Error(EDGELORA_BAD_FILE, why); }

int64_t count(const NodeInfo& node, const char* attribute, int64_t most) {
  const int64_t value = node.integer(attribute);
  if (value >= 1 && value <= most) return value;
  refuse(std::string(attribute) + " is " + std::to_string(value) + ", expected 1 to " +
         std::to_string(most));
}

const float* table(const NodeInfo& node, size_t index, const char* what, int64_t half,
                   int64_t* positions) {
  const std::optional<Tensor> tensor = node.constant(index, what);
  if (!tensor || tensor->type != kFloat || tensor->shape.rank != 2 ||
      tensor->shape.dims[1] != half) {
    refuse(std::string(what) + " must be float32 [positions, " + std::to_string(half) + "]");
  }
  *positions = std::min(*positions, tensor->shape.dims[0]);
  return static_cast<const float*>(tensor->data);
}

bool read_exact(const Shared& shared, const NodeInfo& node) {
  const std::string format = node.text("kv_format");
  if (format != "int8" && format != "float") {
    refuse("kv_format is \"" + format + "\", expected int8 or float");
  }
  return shared.exact || format == "float";
}

AttentionNode read_node(const NodeInfo& node) {
  constexpr int64_t kMostHeads = 1 << 16;
  AttentionNode read{};
  read.heads = count(node, "num_heads", kMostHeads);
  read.kv_heads = count(node, "kv_num_heads", read.heads);
  read.head_dim = count(node, "head_dim", kMostHeadDim);
  if (read.heads % read.kv_heads != 0) refuse("num_heads is no multiple of kv_num_heads");
  if (read.head_dim % 2 != 0) refuse("head_dim is odd: rotary embedding needs two halves");
  read.window = node.integer("local_window_size");
  if (read.window != -1 && read.window < 1) refuse("local_window_size is neither −1 nor positive");
  read.epsilon = node.real("epsilon");
  read.positions = INT64_MAX;
  read.cos = table(node, kCos, "cos", read.head_dim / 2, &read.positions);
  read.sin = table(node, kSin, "sin", read.head_dim / 2, &read.positions);
  read.q_norm = node.floats(kQueryNorm, "q_norm", read.head_dim);
  read.k_norm = node.floats(kKeyNorm, "k_norm", read.head_dim);
  return read;
}

// past and present of keys or of values.
struct CacheTensors {
  Tensor past;
  Shape shape;  // of present
  uint8_t* present;
};

class Attention : public Kernel {
 public:
  Attention(const Shared& shared, const NodeInfo& node)
      : shared_(shared),
        node_(read_node(node)),
        layout_(node_.head_dim, read_exact(shared, node)),
        packed_(!node.has_input(kKey)) {
    if (packed_ != !node.has_input(kValue)) refuse("k and v come together or packed with q");
  }

  void compute(OrtKernelContext* context) const override {
    AttentionCall call{};
    call.kernels = shared_.kernels;
    call.node = &node_;
    call.layout = layout_;
    call.threads = shared_.crews->threads();
    const Tensor q = read_rows(context, &call);
    const std::vector<int64_t>& past = read_past(context, &call);
    call.past = past.data();
    bind_cache(context, past, &call);
    Shape shape = q.shape;
    shape.dims[2] = node_.heads * node_.head_dim;
    call.y = float_output(*shared_.api, context, shape);
    if (shape.elements() > 0) AttentionJob(call).run(shared_.crews);
  }

 private:
  Tensor read_rows(const OrtKernelContext* context, AttentionCall* call) const {
    const int64_t q_width = node_.heads * node_.head_dim, kv_width = node_.kv_heads * node_.head_dim;
    const Tensor q = rows(context, kQuery, "q", packed_ ? q_width + 2 * kv_width : q_width);
    call->batch = q.shape.dims[0];
    call->sequence = q.shape.dims[1];
    call->q = {static_cast<const float*>(q.data), q.shape.dims[2]};
    if (packed_) {
      call->k = {call->q.data + q_width, call->q.stride};
      call->v = {call->k.data + kv_width, call->q.stride};
      return q;
    }
    const Tensor k = rows(context, kKey, "k", kv_width), v = rows(context, kValue, "v", kv_width);
    for (const Tensor* other : {&k, &v}) {
      if (other->shape.dims[0] == call->batch && other->shape.dims[1] == call->sequence) continue;
      throw Error(EDGELORA_INVALID_ARGUMENT, "k or v is " + to_string(other->shape) + ", q is " +
                                                 to_string(q.shape));
    }
    call->k = {static_cast<const float*>(k.data), kv_width};
    call->v = {static_cast<const float*>(v.data), kv_width};
    return q;
  }

  Tensor rows(const OrtKernelContext* context, size_t index, const char* what,
              int64_t width) const {
    const Tensor tensor = input(*shared_.api, context, index);
    if (tensor.shape.rank == 3 && tensor.shape.dims[2] == width) return tensor;
    throw Error(EDGELORA_INVALID_ARGUMENT, std::string(what) + " is " + to_string(tensor.shape) +
                                               ", expected [batch, sequence, " +
                                               std::to_string(width) + "]");
  }

  // Positions before the call, of each sequence. A first prefill that is padded on the right has fewer
  // positions than rows: its surplus rows lie behind them and are overwritten by what follows.
  const std::vector<int64_t>& read_past(const OrtKernelContext* context,
                                        AttentionCall* call) const {
    const Tensor last = input(*shared_.api, context, kLastPosition);
    if (last.shape.rank != 1 || last.shape.dims[0] != call->batch) {
      throw Error(EDGELORA_INVALID_ARGUMENT, "last position is " + to_string(last.shape) +
                                                 ", expected [" + std::to_string(call->batch) + "]");
    }
    thread_local std::vector<int64_t> past;
    past.resize(static_cast<size_t>(call->batch));
    for (size_t i = 0; i < past.size(); ++i) {
      const int64_t positions = int64_t{static_cast<const int32_t*>(last.data)[i]} + 1;
      if (positions < 0) {
        throw Error(EDGELORA_INVALID_ARGUMENT,
                    "last position is " + std::to_string(positions - 1) + ", expected −1 or more");
      }
      past[i] = std::max<int64_t>(0, positions - call->sequence);
      if (past[i] + call->sequence <= node_.positions) continue;
      throw Error(EDGELORA_INVALID_ARGUMENT,
                  "position " + std::to_string(past[i] + call->sequence) +
                      " is beyond the context of " + std::to_string(node_.positions));
    }
    return past;
  }

  void bind_cache(OrtKernelContext* context, const std::vector<int64_t>& past,
                  AttentionCall* call) const {
    int64_t longest = 0;
    for (const int64_t positions : past) longest = std::max(longest, positions);
    const CacheTensors keys = cache(context, kPastKey, kPresentKey, layout_.key_row_bytes(), longest,
                                    call->sequence, call->batch);
    const CacheTensors values = cache(context, kPastValue, kPresentValue, layout_.value_row_bytes(),
                                      longest, call->sequence, call->batch);
    if (!(keys.past.shape.dims[2] == values.past.shape.dims[2])) {
      throw Error(EDGELORA_INVALID_ARGUMENT, "past_key and past_value differ in capacity");
    }
    call->capacity = keys.shape.dims[2];
    call->keys = keys.present;
    call->values = values.present;
    copy_heads<KeyRows>(keys, layout_.key_row_bytes(), past);
    copy_heads<ValueRows>(values, layout_.value_row_bytes(), past);
  }

  // present has the capacity of past, or more where that is full.
  CacheTensors cache(OrtKernelContext* context, size_t in, size_t out, int64_t row_bytes,
                     int64_t past, int64_t sequence, int64_t batch) const {
    CacheTensors tensors{input(*shared_.api, context, in), {}, nullptr};
    const Shape& shape = tensors.past.shape;
    const bool fits = shape.rank == 4 && shape.dims[0] == batch &&
                      shape.dims[1] == node_.kv_heads && shape.dims[2] % kCapacityStep == 0 &&
                      shape.dims[3] == row_bytes;
    if (!fits || shape.dims[2] < past) {
      throw Error(EDGELORA_INVALID_ARGUMENT,
                  "the kv_cache is " + to_string(shape) + ", expected [" + std::to_string(batch) +
                      ", " + std::to_string(node_.kv_heads) + ", a multiple of 32 ≥ " +
                      std::to_string(past) + ", " + std::to_string(row_bytes) + "]");
    }
    tensors.shape = shape;
    tensors.shape.dims[2] =
        std::max(shape.dims[2], KvLayout::capacity_for(past + sequence));
    tensors.present = static_cast<uint8_t*>(output(*shared_.api, context, out, tensors.shape));
    return tensors;
  }

  // Nothing where past and present are one tensor.
  template <class Rows>
  void copy_heads(const CacheTensors& tensors, int64_t row_bytes,
                  const std::vector<int64_t>& past) const {
    auto* from = static_cast<uint8_t*>(const_cast<void*>(tensors.past.data));  // only read
    if (from == tensors.present) return;
    const int64_t before = tensors.past.shape.dims[2], after = tensors.shape.dims[2];
    for (int64_t i = 0; i < static_cast<int64_t>(past.size()) * node_.kv_heads; ++i) {
      const Rows source(layout_, before, from + i * before * row_bytes);
      Rows(layout_, after, tensors.present + i * after * row_bytes)
          .copy_from(source, past[static_cast<size_t>(i / node_.kv_heads)]);
    }
  }

  const Shared shared_;
  const AttentionNode node_;
  const KvLayout layout_;
  const bool packed_;
};

std::unique_ptr<Kernel> create(const Shared& shared, const NodeInfo& node) {
  return std::make_unique<Attention>(shared, node);
}

}  // namespace

const Schema kAttentionSchema{"Attention", kInputs,  std::size(kInputs),
                              kOutputs,    std::size(kOutputs), create};

}  // namespace edgelora::ops
