#include "ops/attention_job.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "kernels/ceil_div.h"
#include "ops/scratch.h"

namespace edgelora::ops {
namespace {

using kernels::ceil_div;

constexpr int64_t kBlock = kernels::kActivationBlock;
constexpr int64_t kPanel = kernels::kPanelRows;
constexpr int64_t kTileRows = 48;  // query rows of a ticket: the kernels' tiles are full
constexpr int64_t kTicketsPerThread = 4;
constexpr int64_t kAppendRows = 32;  // positions of an append ticket

// A row of −Inf only: nothing seen yet.
constexpr float kNothing = -HUGE_VALF;

}  // namespace

struct AttentionJob::Buffers {
  Buffers() = default;
  Buffers(const AttentionJob& job, int64_t rows, Pieces& pieces) {
    const int64_t d = job.node_.head_dim, dv = job.call_.layout.value_width();
    const int64_t width = std::max(job.call_.layout.key_width(), kAttentionChunk);
    queries = pieces.take<float>(rows * d);
    scores = pieces.take<float>(rows * kAttentionChunk);
    products = pieces.take<float>(rows * dv);
    most = pieces.take<float>(rows);
    sum = pieces.take<float>(rows);
    out = pieces.take<float>(rows * d);
    query_codes = pieces.take<int8_t>(rows * job.call_.layout.key_width());
    codes = pieces.take<int8_t>(rows * width);
    query_scales = pieces.take<float>(rows * width / kBlock);
    scales = pieces.take<float>(rows * width / kBlock);
    query_sums = pieces.take<int32_t>(rows * width / kBlock);
    sums = pieces.take<int32_t>(rows * width / kBlock);
    const kernels::Weights k = KeyRows(job.call_.layout, kCapacityStep, nullptr).weights(1);
    const kernels::Weights v =
        ValueRows(job.call_.layout, kCapacityStep, nullptr).weights(0, kAttentionChunk);
    linear = pieces.take<char>(
        std::max(kernels::linear_scratch_bytes(k), kernels::linear_scratch_bytes(v)));
  }

  float* queries;       // [rows, D]; scaled by 1/√D, if exact, else its codes' scales are
  float* scores;        // [rows, chunk], then the softmax
  float* products;      // [rows, D] of one chunk
  float *most, *sum, *out;
  int8_t *query_codes, *codes;
  float *query_scales, *scales;
  int32_t *query_sums, *sums;
  char* linear;
};

AttentionJob::AttentionJob(const AttentionCall& call)
    : call_(call), node_(*call.node), group_(node_.heads / node_.kv_heads) {
  plan_tickets();
  if (splits_ == 1) return;
  const int64_t tickets = call_.batch * node_.kv_heads * tiles_ * splits_;
  const int64_t rows = tile_queries_ * group_;
  partials_ = static_cast<float*>(
      scratch(ScratchUse::kCall, tickets * rows * (node_.head_dim + 2) * 4));
  if (partials_ == nullptr) throw std::bad_alloc();
}

void AttentionJob::plan_tickets() {
  const int64_t longest = *std::max_element(call_.past, call_.past + call_.batch) + call_.sequence;
  const int64_t queries = call_.sequence - call_.first_query;
  tile_queries_ = std::min(queries, std::max<int64_t>(1, kTileRows / group_));
  tiles_ = queries == 0 ? 0 : ceil_div(queries, tile_queries_);
  const int64_t tickets = call_.batch * node_.kv_heads * tiles_;
  const double work = static_cast<double>(2 * longest * node_.head_dim * node_.heads) *
                      static_cast<double>(queries * call_.batch);
  const double shares = work / static_cast<double>(kWorkPerThread);
  workers_ = static_cast<int64_t>(std::clamp(shares, 1.0, static_cast<double>(call_.threads)));
  if (workers_ > 1 && 0 < tickets && tickets < workers_ * kTicketsPerThread) {
    splits_ = std::min(ceil_div(longest, kAttentionChunk),
                       ceil_div(workers_ * kTicketsPerThread, tickets));
  }
  split_step_ = KvLayout::capacity_for(ceil_div(longest, splits_));
  if (call_.sequence > 1 || queries == 0) {
    append_tickets_ = call_.batch * node_.kv_heads * ceil_div(call_.sequence, kAppendRows);
  }
}

KeyRows AttentionJob::keys(int64_t sequence, int64_t kv_head) const {
  const int64_t head = sequence * node_.kv_heads + kv_head;
  return {call_.layout, call_.capacity,
          call_.keys + head * call_.capacity * call_.layout.key_row_bytes()};
}

ValueRows AttentionJob::values(int64_t sequence, int64_t kv_head) const {
  const int64_t head = sequence * node_.kv_heads + kv_head;
  return {call_.layout, call_.capacity,
          call_.values + head * call_.capacity * call_.layout.value_row_bytes()};
}

void AttentionJob::run(Crews* crews) {
  appended_.expect(append_tickets_);
  const int64_t tickets = call_.batch * node_.kv_heads * tiles_ * splits_;
  crews->run(workers_, append_tickets_ + tickets, *this);
  if (out_of_memory_.load(std::memory_order_relaxed)) throw std::bad_alloc();
  for (int64_t t = 0; splits_ > 1 && t < tickets; t += splits_) combine(t);
}

void AttentionJob::operator()(int64_t ticket) {
  if (ticket >= append_tickets_) return attend(ticket - append_tickets_);
  append(ticket);
  appended_.finish_one();
}

void AttentionJob::append(int64_t ticket) {
  const int64_t groups = ceil_div(call_.sequence, kAppendRows);
  const int64_t head = ticket / groups, begin = ticket % groups * kAppendRows;
  const int64_t end = std::min(call_.sequence, begin + kAppendRows);
  for (int64_t i = begin; i < end; ++i) {
    append_row(head / node_.kv_heads, head % node_.kv_heads, i);
  }
}

void AttentionJob::append_row(int64_t sequence, int64_t kv_head, int64_t i) {
  const int64_t row = sequence * call_.sequence + i, position = call_.past[sequence] + i;
  float key[kMostHeadDim];
  prepare_head(call_.k.data + row * call_.k.stride + kv_head * node_.head_dim, node_.k_norm,
               position, key);
  keys(sequence, kv_head).put(*call_.kernels, position, key);
  values(sequence, kv_head)
      .put(position, call_.v.data + row * call_.v.stride + kv_head * node_.head_dim);
}

void AttentionJob::prepare_head(const float* from, const float* norm, int64_t position,
                                float* to) const {
  const int64_t d = node_.head_dim;
  if (norm != nullptr) {
    call_.kernels->rms_norm(from, norm, d, node_.epsilon, to);
    from = to;
  }
  call_.kernels->rotate(from, node_.cos + position * d / 2, node_.sin + position * d / 2, d / 2,
                        to);
}

AttentionJob::Part AttentionJob::part_of(int64_t ticket) const {
  const int64_t split = ticket % splits_, tile = ticket / splits_ % tiles_;
  const int64_t head = ticket / splits_ / tiles_;
  Part part{};
  part.sequence = head / node_.kv_heads;
  part.kv_head = head % node_.kv_heads;
  part.query_begin = call_.first_query + tile * tile_queries_;
  part.query_end = std::min(call_.sequence, part.query_begin + tile_queries_);
  const int64_t past = call_.past[part.sequence];
  const int64_t seen = past + part.query_end;  // by the last row
  const int64_t oldest =  // seen by the first row
      node_.window < 0 ? 0 : std::max<int64_t>(0, past + part.query_begin + 1 - node_.window);
  part.begin = std::max(split * split_step_, oldest / kCapacityStep * kCapacityStep);
  part.end = split + 1 == splits_ ? seen : std::min(seen, (split + 1) * split_step_);
  return part;
}

AttentionJob::Softmax AttentionJob::partial(int64_t ticket) const {
  const int64_t rows = tile_queries_ * group_;
  float* most = partials_ + ticket * rows * (node_.head_dim + 2);
  return {most, most + rows, most + 2 * rows};
}

void AttentionJob::attend(int64_t ticket) {
  const Part part = part_of(ticket);
  const int64_t rows = rows_of(part);
  Buffers buffers{};
  const auto layout = [&](Pieces& pieces) { buffers = Buffers(*this, rows, pieces); };
  if (!take_pieces(ScratchUse::kWorker, layout)) {
    return out_of_memory_.store(true, std::memory_order_relaxed);
  }
  const Softmax softmax =
      splits_ > 1 ? partial(ticket) : Softmax{buffers.most, buffers.sum, buffers.out};
  std::fill_n(softmax.most, rows, kNothing);
  std::fill_n(softmax.sum, rows, 0.0f);
  if (part.begin >= part.end) std::fill_n(softmax.out, rows * node_.head_dim, 0.0f);
  load_queries(part, buffers);
  if (call_.sequence > 1) {
    appended_.wait();
  } else if (part.begin < part.end && part.end > call_.past[part.sequence]) {
    // Of all parts this one alone sees the one new position.
    append_row(part.sequence, part.kv_head, 0);
  }
  for (int64_t begin = part.begin; begin < part.end; begin += kAttentionChunk) {
    const int64_t end = std::min(part.end, begin + kAttentionChunk);
    score(part, begin, end, buffers);
    soften(part, begin, end, buffers, softmax);
    add_values(part, begin, end, buffers, softmax);
  }
  if (splits_ == 1) finish(part, softmax);
}

void AttentionJob::load_queries(const Part& part, const Buffers& buffers) const {
  const int64_t d = node_.head_dim, width = call_.layout.key_width(), blocks = width / kBlock;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (int64_t r = 0; r < rows_of(part); ++r) {
    const int64_t m = part.sequence * call_.sequence + part.query_begin + r / group_;
    const int64_t head = part.kv_head * group_ + r % group_;
    float* query = buffers.queries + r * d;
    prepare_head(call_.q.data + m * call_.q.stride + head * d, node_.q_norm, position_of(part, r),
                 query);
    if (call_.layout.exact()) {
      for (int64_t i = 0; i < d; ++i) query[i] *= scale;
      continue;
    }
    float* scales = buffers.query_scales + r * blocks;
    call_.kernels->quantize_activations(query, d, buffers.query_codes + r * width, scales,
                                        buffers.query_sums + r * blocks);
    for (int64_t b = 0; b < blocks; ++b) scales[b] *= scale;
  }
}

// scores [rows, end − begin] = q · k
void AttentionJob::score(const Part& part, int64_t begin, int64_t end,
                         const Buffers& buffers) const {
  const kernels::Weights weights = keys(part.sequence, part.kv_head).weights(end);
  const int64_t first = begin / kPanel, last = ceil_div(end, kPanel);
  float* y = buffers.scores - begin;  // where position 0 would lie
  if (call_.layout.exact()) {
    call_.kernels->linear_float(weights, buffers.queries, rows_of(part), first, last, y,
                                kAttentionChunk, buffers.linear);
    return;
  }
  const kernels::Activations queries{rows_of(part), buffers.query_codes, buffers.query_scales,
                                     buffers.query_sums};
  call_.kernels->linear(weights, queries, first, last, y, kAttentionChunk, buffers.linear);
}

// Scores → e^(score − largest so far), times the values' scales, quantized; 0 where a row sees
// nothing.
void AttentionJob::soften(const Part& part, int64_t begin, int64_t end, const Buffers& buffers,
                          const Softmax& softmax) const {
  const float* scales = values(part.sequence, part.kv_head).scales();
  const int64_t count = end - begin, blocks = ceil_div(count, kBlock);
  for (int64_t r = 0; r < rows_of(part); ++r) {
    const int64_t position = position_of(part, r);
    const int64_t last = std::clamp<int64_t>(position + 1 - begin, 0, count);
    const int64_t oldest = node_.window < 0 ? 0 : position + 1 - node_.window;
    const int64_t first = std::clamp<int64_t>(oldest - begin, 0, last);
    float* row = buffers.scores + r * kAttentionChunk;
    std::fill(row, row + first, 0.0f);
    std::fill(row + last, row + count, 0.0f);
    if (first < last) soften_row(row, first, last, r, softmax);
    if (scales == nullptr) continue;
    for (int64_t i = first; i < last; ++i) row[i] *= scales[begin + i];
    call_.kernels->quantize_activations(row, count, buffers.codes + r * blocks * kBlock,
                                        buffers.scales + r * blocks, buffers.sums + r * blocks);
  }
}

void AttentionJob::soften_row(float* scores, int64_t first, int64_t last, int64_t row,
                              const Softmax& softmax) const {
  const float before = softmax.most[row];
  float most = std::max(before, call_.kernels->largest(scores + first, last - first));
  if (most == kNothing) most = 0.0f;  // only NaN, which the sum keeps
  const float sum = call_.kernels->exp_minus(scores + first, last - first, most);
  softmax.most[row] = most;
  if (before == most) {
    softmax.sum[row] += sum;
    return;
  }
  const float factor = std::exp(before - most);
  softmax.sum[row] = softmax.sum[row] * factor + sum;
  float* out = softmax.out + row * node_.head_dim;
  for (int64_t i = 0; i < node_.head_dim; ++i) out[i] *= factor;
}

// out += softmax · values of the chunk; of the first one out is new
void AttentionJob::add_values(const Part& part, int64_t begin, int64_t end, const Buffers& buffers,
                              const Softmax& softmax) const {
  const ValueRows all = values(part.sequence, part.kv_head);
  const int64_t d = node_.head_dim, panels = ceil_div(d, kPanel), rows = rows_of(part);
  const bool first = begin == part.begin;
  float* products = first ? softmax.out : buffers.products;
  if (call_.layout.exact()) {
    for (int64_t r = 0; r < rows; ++r) {
      // No position behind the row: 0 times what is no number would be none.
      const int64_t seen = std::clamp(position_of(part, r) + 1, begin, end);
      float* product = products + r * d;
      std::fill_n(product, d, 0.0f);
      if (seen == begin) continue;
      call_.kernels->linear_float(all.weights(begin, seen), buffers.scores + r * kAttentionChunk, 1,
                                  0, panels, product, d, buffers.linear);
    }
  } else {
    const kernels::Activations x{rows, buffers.codes, buffers.scales, buffers.sums};
    call_.kernels->linear(all.weights(begin, end), x, 0, panels, products, d, buffers.linear);
  }
  for (int64_t i = 0; i < rows * d && !first; ++i) softmax.out[i] += products[i];
}

void AttentionJob::finish(const Part& part, const Softmax& softmax) const {
  const int64_t d = node_.head_dim;
  for (int64_t r = 0; r < rows_of(part); ++r) {
    const int64_t m = part.sequence * call_.sequence + part.query_begin + r / group_;
    const int64_t head = part.kv_head * group_ + r % group_;
    float* y = call_.y + (m * node_.heads + head) * d;
    const float inverse = 1.0f / softmax.sum[r];
    for (int64_t i = 0; i < d; ++i) y[i] = softmax.out[r * d + i] * inverse;
  }
}

// The splits of one tile, added up in the first one's place.
void AttentionJob::combine(int64_t first_ticket) const {
  const Part part = part_of(first_ticket);
  const Softmax total = partial(first_ticket);
  const int64_t d = node_.head_dim;
  for (int64_t split = 1; split < splits_; ++split) {
    const Softmax more = partial(first_ticket + split);
    for (int64_t r = 0; r < rows_of(part); ++r) {
      if (more.sum[r] == 0.0f) continue;  // the row saw nothing there
      const float most = std::max(total.most[r], more.most[r]);
      const float keep = std::exp(total.most[r] - most), add = std::exp(more.most[r] - most);
      total.most[r] = most;
      total.sum[r] = total.sum[r] * keep + more.sum[r] * add;
      for (int64_t i = 0; i < d; ++i) {
        total.out[r * d + i] = total.out[r * d + i] * keep + more.out[r * d + i] * add;
      }
    }
  }
  finish(part, total);
}

}  // namespace edgelora::ops
