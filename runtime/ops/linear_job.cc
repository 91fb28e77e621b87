#include "ops/linear_job.h"

#include <algorithm>
#include <new>

#include "ops/scratch.h"

namespace edgelora::ops {
namespace {

constexpr int64_t kPanelRows = kernels::kPanelRows;
constexpr int64_t kBlock = kernels::kActivationBlock;

// Below this many multiplications a second thread costs more than it saves (about 3 µs to wake and
// to join).
constexpr int64_t kWorkPerThread = 96 * 1024;
// Tickets a thread gets when there is work enough: evens out a thread that is late or slow.
constexpr int64_t kTicketsPerThread = 4;
// Values of x from which on quantizing is shared.
constexpr int64_t kSharedQuantize = 16 * 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

}  // namespace

LinearJob::LinearJob(const LinearCall& call) : call_(call), weights_(*call.weights) {
  plan_tickets();
  take_scratch();
}

void LinearJob::plan_tickets() {
  const int64_t k = weights_.in_features;
  const double work = static_cast<double>(call_.panels * kPanelRows * k) *
                      static_cast<double>(call_.rows);  // may exceed int64 for absurd shapes
  const double shares = work / static_cast<double>(kWorkPerThread);
  workers_ = shares >= static_cast<double>(call_.threads)
                 ? call_.threads
                 : std::max<int64_t>(1, static_cast<int64_t>(shares));
  const bool plenty = shares >= static_cast<double>(call_.threads * kTicketsPerThread);
  const int64_t pieces = workers_ * (plenty ? kTicketsPerThread : 1);
  panel_tickets_ = std::min(call_.panels, pieces);
  row_groups_ = std::min(call_.rows, pieces);
  if (!call_.exact && workers_ > 1 && call_.rows > 1 && call_.rows * k >= kSharedQuantize) {
    quantize_tickets_ = row_groups_;
  }
  if (call_.adapters->t_size() > 0) down_tickets_ = row_groups_ * weights_.slice_count;
}

void LinearJob::take_scratch() {
  const int64_t rows = call_.rows;
  const int64_t blocks = ceil_div(weights_.in_features, kBlock);
  const int64_t codes = call_.exact ? 0 : align(rows * blocks * kBlock);
  const int64_t scales = call_.exact ? 0 : align(rows * blocks * 4);
  const int64_t t = align(rows * call_.adapters->t_size() * 4);
  auto* bytes = static_cast<int8_t*>(scratch(ScratchUse::kCall, codes + 2 * scales + t));
  if (bytes == nullptr) throw std::bad_alloc();
  codes_ = bytes;
  scales_ = reinterpret_cast<float*>(bytes + codes);
  sums_ = reinterpret_cast<int32_t*>(bytes + codes + scales);
  t_ = reinterpret_cast<float*>(bytes + codes + 2 * scales);
}

void LinearJob::run(const OrtApi& api, const OrtKernelContext* context) {
  if (!call_.exact && quantize_tickets_ == 0) quantize_rows(0, call_.rows);
  quantized_.expect(quantize_tickets_);
  downs_.expect(down_tickets_);
  run_tickets(api, context, workers_, quantize_tickets_ + down_tickets_ + panel_tickets_, *this);
  if (out_of_memory_.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

void LinearJob::operator()(int64_t ticket) {
  if (ticket < quantize_tickets_) {
    quantize_rows(group_begin(ticket), group_begin(ticket + 1));
    return quantized_.finish_one();
  }
  ticket -= quantize_tickets_;
  if (ticket < down_tickets_) {
    const int64_t group = ticket / weights_.slice_count;
    down(ticket % weights_.slice_count, group_begin(group), group_begin(group + 1));
    return downs_.finish_one();
  }
  ticket -= down_tickets_;
  panels(call_.panels * ticket / panel_tickets_, call_.panels * (ticket + 1) / panel_tickets_);
}

int64_t LinearJob::group_begin(int64_t group) const { return call_.rows * group / row_groups_; }

void LinearJob::quantize_rows(int64_t begin, int64_t end) {
  const int64_t k = weights_.in_features;
  const int64_t blocks = ceil_div(k, kBlock);
  for (int64_t m = begin; m < end; ++m) {
    call_.kernels->quantize_activations(call_.x + m * k, k, codes_ + m * blocks * kBlock,
                                        scales_ + m * blocks, sums_ + m * blocks);
  }
}

void LinearJob::down(int64_t slice, int64_t row_begin, int64_t row_end) {
  const int64_t k = weights_.in_features;
  for (int64_t m = row_begin; m < row_end; ++m) {
    const NodeAdapter* adapter = of_row(m);
    if (adapter == nullptr) continue;
    float* t = t_ + m * call_.adapters->t_size();
    for (const Branch& branch : adapter->slices[static_cast<size_t>(slice)]) {
      call_.kernels->side_branch_down(branch.factors, k, branch.weight, call_.x + m * k,
                                      t + branch.offset);
    }
  }
}

void LinearJob::panels(int64_t begin, int64_t end) {
  void* worker = scratch(ScratchUse::kWorker, kernels::linear_scratch_bytes(weights_));
  if (worker == nullptr) return out_of_memory_.store(true, std::memory_order_relaxed);
  const int64_t n = weights_.out_features;
  if (call_.exact) {
    call_.kernels->linear_float(weights_, call_.x, call_.rows, begin, end, call_.y, n, worker);
  } else {
    quantized_.wait();
    const kernels::Activations x{call_.rows, codes_, scales_, sums_};
    call_.kernels->linear(weights_, x, begin, end, call_.y, n, worker);
  }
  if (call_.adapters->t_size() > 0) {
    downs_.wait();
    up(begin, end);
  }
  if (call_.bias != nullptr) add_bias(begin, end);
}

// The slices that [begin, end) touches, each with its own panel numbers.
void LinearJob::up(int64_t begin, int64_t end) {
  int64_t row = 0;  // first row of the slice; a multiple of 16 but for a slice alone
  for (int64_t slice = 0; slice < weights_.slice_count; ++slice) {
    const int64_t first = row / kPanelRows;
    const int64_t last = first + ceil_div(weights_.slices[slice], kPanelRows);
    const int64_t from = std::max(begin, first);
    const int64_t to = std::min(end, last);
    if (from < to) up_slice(slice, row, from - first, to - first);
    row += weights_.slices[slice];
  }
}

void LinearJob::up_slice(int64_t slice, int64_t slice_row, int64_t begin, int64_t end) {
  for (int64_t m = 0; m < call_.rows; ++m) {
    const NodeAdapter* adapter = of_row(m);
    if (adapter == nullptr) continue;
    const float* t = t_ + m * call_.adapters->t_size();
    float* y = call_.y + m * weights_.out_features + slice_row;
    for (const Branch& branch : adapter->slices[static_cast<size_t>(slice)]) {
      call_.kernels->side_branch_up(branch.factors, weights_.slices[slice], t + branch.offset,
                                    begin, end, y);
    }
  }
}

void LinearJob::add_bias(int64_t begin, int64_t end) {
  const int64_t n = weights_.out_features;
  const int64_t from = begin * kPanelRows;
  const int64_t to = std::min(end * kPanelRows, n);
  for (int64_t m = 0; m < call_.rows; ++m) {
    float* y = call_.y + m * n;
    for (int64_t i = from; i < to; ++i) y[i] += call_.bias[i];
  }
}

}  // namespace edgelora::ops
