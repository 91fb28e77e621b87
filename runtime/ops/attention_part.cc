#include "ops/attention_part.h"

#include <algorithm>

namespace edgelora::ops {
namespace {

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
  if (!tensor || tensor->type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || tensor->shape.rank != 2 ||
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

AttentionNode read_node(const NodeInfo& node, const NodeInfo& constants) {
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
  read.cos = table(constants, AttentionPart::kCos, "cos", read.head_dim / 2, &read.positions);
  read.sin = table(constants, AttentionPart::kSin, "sin", read.head_dim / 2, &read.positions);
  read.q_norm = constants.floats(AttentionPart::kQueryNorm, "q_norm", read.head_dim);
  read.k_norm = constants.floats(AttentionPart::kKeyNorm, "k_norm", read.head_dim);
  return read;
}

}  // namespace

AttentionPart::AttentionPart(const Shared& shared, const NodeInfo& node, size_t first)
    : shared_(shared),
      first_(first),
      node_(read_node(node, node.part("", first))),
      layout_(node_.head_dim, read_exact(shared, node)) {}

AttentionRun AttentionPart::packed_run(const float* x, float* y, int64_t batch,
                                       int64_t sequence) const {
  const int64_t stride = q_width() + 2 * kv_width();
  return {{x, stride}, {x + q_width(), stride}, {x + q_width() + kv_width(), stride}, y, batch,
          sequence};
}

AttentionPart::Caches AttentionPart::open(OrtKernelContext* context, int64_t batch,
                                          int64_t sequence) const {
  const std::vector<int64_t>& past = read_past(context, batch, sequence);
  const int64_t longest = past.empty() ? 0 : *std::max_element(past.begin(), past.end());
  const int64_t key_bytes = layout_.key_row_bytes(), value_bytes = layout_.value_row_bytes();
  const Room room{batch, longest, KvLayout::capacity_for(longest + sequence)};
  const Caches caches{cache(context, room, kPastKey, kPresentKey, key_bytes),
                      cache(context, room, kPastValue, kPresentValue, value_bytes), &past};
  if (caches.keys.past.shape.dims[2] != caches.values.past.shape.dims[2]) {
    throw Error(EDGELORA_INVALID_ARGUMENT, "past_key and past_value differ in capacity");
  }
  copy_heads<KeyRows>(caches.keys, key_bytes, past);
  copy_heads<ValueRows>(caches.values, value_bytes, past);
  if (sequence == 1) prefetch_rows(caches);
  return caches;
}

// A position's row has a line for every four of its values.
void AttentionPart::prefetch_rows(const Caches& caches) const {
  const int64_t capacity = caches.keys.shape.dims[2];
  for (int64_t i = 0; i < static_cast<int64_t>(caches.past->size()) * node_.kv_heads; ++i) {
    const int64_t position = (*caches.past)[static_cast<size_t>(i / node_.kv_heads)];
    const int64_t rows = i * capacity;
    KeyRows(layout_, capacity, caches.keys.present + rows * layout_.key_row_bytes())
        .prefetch(position);
    ValueRows(layout_, capacity, caches.values.present + rows * layout_.value_row_bytes())
        .prefetch(position);
  }
}

void AttentionPart::run(const Caches& caches, const AttentionRun& run) const {
  if (run.batch * run.sequence == 0) return;
  AttentionCall call{};
  call.kernels = shared_.kernels;
  call.node = &node_;
  call.layout = layout_;
  call.q = run.q;
  call.k = run.k;
  call.v = run.v;
  call.y = run.y;
  call.batch = run.batch;
  call.sequence = run.sequence;
  call.first_query = run.first_query;
  call.past = caches.past->data();
  call.keys = caches.keys.present;
  call.values = caches.values.present;
  call.capacity = caches.keys.shape.dims[2];
  call.threads = shared_.crews->threads();
  AttentionJob(call).run(shared_.crews);
}

// Positions before the call, of each sequence. A first prefill that is padded on the right has
// fewer positions than rows: its surplus rows lie behind them and are overwritten by what follows.
const std::vector<int64_t>& AttentionPart::read_past(const OrtKernelContext* context,
                                                     int64_t batch, int64_t sequence) const {
  const Tensor last = input(*shared_.api, context, first_ + kLastPosition);
  if (last.shape.rank != 1 || last.shape.dims[0] != batch) {
    throw Error(EDGELORA_INVALID_ARGUMENT, "last position is " + to_string(last.shape) +
                                               ", expected [" + std::to_string(batch) + "]");
  }
  thread_local std::vector<int64_t> past;  // kept, so that no token allocates
  past.resize(static_cast<size_t>(batch));
  for (size_t i = 0; i < past.size(); ++i) {
    const int64_t positions = int64_t{static_cast<const int32_t*>(last.data)[i]} + 1;
    if (positions < 0) {
      throw Error(EDGELORA_INVALID_ARGUMENT,
                  "last position is " + std::to_string(positions - 1) + ", expected −1 or more");
    }
    past[i] = std::max<int64_t>(0, positions - sequence);
    if (past[i] + sequence <= node_.positions) continue;
    throw Error(EDGELORA_INVALID_ARGUMENT,
                "position " + std::to_string(past[i] + sequence) +
                    " is beyond the context of " + std::to_string(node_.positions));
  }
  return past;
}

// present has the capacity of past, or more where that is full.
AttentionPart::Cache AttentionPart::cache(OrtKernelContext* context, const Room& room, size_t in,
                                          size_t out, int64_t row_bytes) const {
  Cache cache{input(*shared_.api, context, first_ + in), {}, nullptr};
  const Shape& shape = cache.past.shape;
  const bool fits = shape.rank == 4 && shape.dims[0] == room.batch &&
                    shape.dims[1] == node_.kv_heads && shape.dims[2] % kCapacityStep == 0 &&
                    shape.dims[3] == row_bytes;
  if (!fits || shape.dims[2] < room.past) {
    throw Error(EDGELORA_INVALID_ARGUMENT,
                "the kv_cache is " + to_string(shape) + ", expected [" +
                    std::to_string(room.batch) + ", " + std::to_string(node_.kv_heads) +
                    ", a multiple of 32 ≥ " + std::to_string(room.past) + ", " +
                    std::to_string(row_bytes) + "]");
  }
  cache.shape = shape;
  cache.shape.dims[2] = std::max(shape.dims[2], room.capacity);
  cache.present = static_cast<uint8_t*>(output(*shared_.api, context, out, cache.shape));
  return cache;
}

// Nothing where past and present are one tensor.
template <class Rows>
void AttentionPart::copy_heads(const Cache& cache, int64_t row_bytes,
                               const std::vector<int64_t>& past) const {
  auto* from = static_cast<uint8_t*>(const_cast<void*>(cache.past.data));  // only read
  if (from == cache.present) return;
  const int64_t before = cache.past.shape.dims[2], after = cache.shape.dims[2];
  for (int64_t i = 0; i < static_cast<int64_t>(past.size()) * node_.kv_heads; ++i) {
    const Rows source(layout_, before, from + i * before * row_bytes);
    Rows(layout_, after, cache.present + i * after * row_bytes)
        .copy_from(source, past[static_cast<size_t>(i / node_.kv_heads)]);
  }
}

}  // namespace edgelora::ops
