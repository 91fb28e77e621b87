#include "ops/linear_job.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "ops/scratch.h"

namespace edgelora::ops {
namespace {

constexpr int64_t kPanelRows = kernels::kPanelRows;
constexpr int64_t kBlock = kernels::kActivationBlock;

// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t kWorkPerThread = 32 * 1024;
// Pieces a thread gets when there is work enough: evens out a thread that is late or slow.
constexpr int64_t kPiecesPerThread = 4;
// Multiplications of a piece that are worth the taking: of one row 16 KB of codes, a microsecond.
constexpr int64_t kWorkPerPiece = 32 * 1024;
// Values of x from which on preparing is shared.
constexpr int64_t kSharedPrepare = 16 * 1024;
// Rows that pass through all steps together: what SwiGLU reads is still in the cache.
constexpr int64_t kTileRows = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// t [rank] → int16 [2·⌈rank/2⌉] in its place, half to even; returns the scale, NaN if a t is not finite.
float quantize_t(float* t, int64_t rank) {
  float most = 0.0f;
  bool finite = true;
  for (int64_t r = 0; r < rank; ++r) {
    const float size = std::fabs(t[r]);
    finite = finite && size <= std::numeric_limits<float>::max();
    most = std::max(most, size);
  }
  const bool none = !finite || most < 0x1p-100f;  // too small to divide by, and to matter
  const float inverse = none ? 0.0f : 32767.0f / most;
  auto* codes = reinterpret_cast<char*>(t);
  for (int64_t r = 0; r < rank + rank % 2; ++r) {
    // Adding 1.5·2^23 leaves the rounded integer in the lowest bits.
    const float shifted = (none || r == rank ? 0.0f : t[r] * inverse) + 0x1.8p23f;
    const auto code = static_cast<int16_t>(shifted - 0x1.8p23f);
    std::memcpy(codes + 2 * r, &code, sizeof code);  // never beyond t[r]
  }
  if (!finite) return std::numeric_limits<float>::quiet_NaN();
  return none ? 0.0f : most / 32767.0f;
}

}  // namespace

LinearJob::LinearJob(const LinearCall& call) : call_(call), weights_(*call.weights) {
  plan_tickets();
  take_scratch();
}

int64_t LinearJob::columns() const {
  return call_.node.activation == Activation::kSwiGlu ? weights_.out_features / 2
                                                      : weights_.out_features;
}

int64_t LinearJob::tile_rows() const { return std::min(kTileRows, call_.rows); }

void LinearJob::plan_tickets() {
  const int64_t k = weights_.in_features;
  const double work = static_cast<double>(call_.panels * kPanelRows * k) *
                      static_cast<double>(call_.rows);  // may exceed int64 for absurd shapes
  const double shares = work / static_cast<double>(kWorkPerThread);
  workers_ = shares >= static_cast<double>(call_.threads)
                 ? call_.threads
                 : std::max<int64_t>(1, static_cast<int64_t>(shares));
  const bool plenty = shares >= static_cast<double>(call_.threads * kPiecesPerThread);
  const int64_t pieces = workers_ * (plenty && workers_ > 1 ? kPiecesPerThread : 1);
  target_panels_ = ceil_div(columns(), kPanelRows);
  workers_ = std::min(workers_, target_panels_);
  shares_.deal(target_panels_, workers_, piece_panels());
  row_groups_ = std::min(call_.rows, pieces);
  if (workers_ > 1 && call_.rows > 1 && call_.rows * k >= kSharedPrepare) {
    prepare_tickets_ = row_groups_;
  }
  if (call_.adapters->t_size() > 0) down_tickets_ = row_groups_ * weights_.slice_count;
}

// One row: small pieces. More: `linear` rearranges them for each piece anew.
int64_t LinearJob::piece_panels() const {
  if (workers_ == 1) return target_panels_;
  if (call_.rows == 1) {
    return std::max<int64_t>(1, kWorkPerPiece / (kPanelRows * weights_.in_features));
  }
  return ceil_div(target_panels_, workers_ * kPiecesPerThread);
}

void LinearJob::take_scratch() {
  const int64_t rows = call_.rows;
  const int64_t blocks = ceil_div(weights_.in_features, kBlock);
  const int64_t codes = call_.exact ? 0 : align(rows * blocks * kBlock);
  const int64_t scales = call_.exact ? 0 : align(rows * blocks * 4);
  const int64_t t = align(rows * call_.adapters->t_size() * 4);
  const int64_t normed = call_.node.norm == nullptr ? 0 : align(rows * weights_.in_features * 4);
  auto* bytes = static_cast<int8_t*>(scratch(ScratchUse::kCall, codes + 2 * scales + t + normed));
  if (bytes == nullptr) throw std::bad_alloc();
  codes_ = bytes;
  scales_ = reinterpret_cast<float*>(bytes + codes);
  sums_ = reinterpret_cast<int32_t*>(bytes + codes + scales);
  t_ = reinterpret_cast<float*>(bytes + codes + 2 * scales);
  normed_ = reinterpret_cast<float*>(bytes + codes + 2 * scales + t);
}

void LinearJob::run(Crews* crews) {
  if (prepare_tickets_ == 0) prepare_rows(0, call_.rows);
  prepared_.expect(prepare_tickets_);
  downs_.expect(down_tickets_);
  crews->run(workers_, prepare_tickets_ + down_tickets_ + workers_, *this);
  if (out_of_memory_.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

void LinearJob::operator()(int64_t ticket) {
  if (ticket < prepare_tickets_) {
    prepare_rows(group_begin(ticket), group_begin(ticket + 1));
    return prepared_.finish_one();
  }
  ticket -= prepare_tickets_;
  if (ticket < down_tickets_) {
    const int64_t group = ticket / weights_.slice_count;
    prepared_.wait();
    down(ticket % weights_.slice_count, group_begin(group), group_begin(group + 1));
    return downs_.finish_one();
  }
  share_panels(ticket - down_tickets_);
}

int64_t LinearJob::group_begin(int64_t group) const { return call_.rows * group / row_groups_; }

const float* LinearJob::input_row(int64_t row) const {
  return (call_.node.norm == nullptr ? call_.x : normed_) + row * weights_.in_features;
}

void LinearJob::prepare_rows(int64_t begin, int64_t end) {
  const int64_t k = weights_.in_features;
  const int64_t blocks = ceil_div(k, kBlock);
  for (int64_t m = begin; m < end; ++m) {
    if (call_.node.norm != nullptr) {
      call_.kernels->rms_norm(call_.x + m * k, call_.node.norm, k, call_.node.epsilon,
                              normed_ + m * k);
    }
    if (call_.exact) continue;
    call_.kernels->quantize_activations(input_row(m), k, codes_ + m * blocks * kBlock,
                                        scales_ + m * blocks, sums_ + m * blocks);
  }
}

// Neighbouring rows of one sequence have one adapter.
void LinearJob::down(int64_t slice, int64_t row_begin, int64_t row_end) {
  for (int64_t m = row_begin; m < row_end;) {
    const NodeAdapter* adapter = of_row(m);
    const int64_t next = (m / call_.sequence_length + 1) * call_.sequence_length;
    const int64_t end = std::min(row_end, next);
    if (adapter != nullptr) {
      for (const Branch& branch : adapter->slices[static_cast<size_t>(slice)]) {
        is_packed(branch) ? down_packed(branch, m, end) : down_branch(branch, m, end);
      }
    }
    m = end;
  }
}

void LinearJob::down_branch(const Branch& branch, int64_t row_begin, int64_t row_end) {
  for (int64_t m = row_begin; m < row_end; ++m) {
    call_.kernels->side_branch_down(branch.factors, weights_.in_features, branch.weight,
                                    input_row(m), t_of(branch, m));
  }
}

// t = A·x of the rows, then each row's as int16 in its own place.
void LinearJob::down_packed(const Branch& branch, int64_t row_begin, int64_t row_end) {
  const kernels::PackedFactors& factors = *branch.packed;
  void* worker = scratch(ScratchUse::kWorker, kernels::linear_scratch_bytes(factors.a));
  if (worker == nullptr) return out_of_memory_.store(true, std::memory_order_relaxed);
  float* t = t_of(branch, row_begin) + 1;
  call_.kernels->linear(factors.a, quantized(row_begin, row_end), 0,
                        ceil_div(factors.rank, kPanelRows), t, call_.adapters->t_size(), worker);
  for (int64_t m = row_begin; m < row_end; ++m) {
    float* scale = t_of(branch, m);
    *scale = branch.weight * quantize_t(scale + 1, factors.rank);
  }
}

kernels::Activations LinearJob::quantized(int64_t row_begin, int64_t row_end) const {
  const int64_t block = row_begin * ceil_div(weights_.in_features, kBlock);
  return {row_end - row_begin, codes_ + block * kBlock, scales_ + block, sums_ + block};
}

// Scratch of `linear`; with SwiGLU gate and up of a tile behind it.
int64_t LinearJob::worker_bytes(int64_t panels) const {
  const int64_t linear = align(kernels::linear_scratch_bytes(weights_));
  const bool swiglu = call_.node.activation == Activation::kSwiGlu;
  return linear + (swiglu ? 2 * 4 * tile_rows() * panels * kPanelRows : 0);
}

void LinearJob::share_panels(int64_t worker) {
  void* memory = scratch(ScratchUse::kWorker, worker_bytes(piece_panels()));
  if (memory == nullptr) return out_of_memory_.store(true, std::memory_order_relaxed);
  prepared_.wait();
  for (Shares::Piece piece; shares_.take(worker, &piece);) panels(piece, memory);
}

void LinearJob::panels(const Shares::Piece& piece, void* worker) {
  for (int64_t m = 0; m < call_.rows; m += kTileRows) {
    const Tile tile{m, std::min(call_.rows, m + kTileRows), piece.begin, piece.end};
    if (call_.node.activation == Activation::kSwiGlu) {
      swiglu_tile(tile, worker);
    } else {
      plain_tile(tile, worker);
    }
    if (call_.residual != nullptr) add_residual(tile);
  }
}

void LinearJob::plain_tile(const Tile& tile, void* worker) {
  product(tile, {call_.y + tile.row_begin * columns(), columns()}, worker);
}

// gate is the first half of W's rows, up the second.
void LinearJob::swiglu_tile(const Tile& tile, void* worker) {
  const int64_t width = (tile.panel_end - tile.panel_begin) * kPanelRows;
  auto* gate = reinterpret_cast<float*>(static_cast<char*>(worker) +
                                        align(kernels::linear_scratch_bytes(weights_)));
  float* up = gate + tile_rows() * width;
  const int64_t first = tile.panel_begin * kPanelRows;
  product(tile, {gate - first, width}, worker);
  const Tile shifted{tile.row_begin, tile.row_end, target_panels_ + tile.panel_begin,
                     target_panels_ + tile.panel_end};
  product(shifted, {up - first - columns(), width}, worker);
  for (int64_t m = tile.row_begin; m < tile.row_end; ++m) {
    const int64_t row = (m - tile.row_begin) * width;
    call_.kernels->swiglu(gate + row, up + row, width, call_.y + m * columns() + first);
  }
}

void LinearJob::product(const Tile& tile, const Target& target, void* worker) {
  const int64_t rows = tile.row_end - tile.row_begin;
  if (call_.exact) {
    call_.kernels->linear_float(weights_, input_row(tile.row_begin), rows, tile.panel_begin,
                                tile.panel_end, target.y, target.stride, worker);
  } else {
    call_.kernels->linear(weights_, quantized(tile.row_begin, tile.row_end), tile.panel_begin,
                          tile.panel_end, target.y, target.stride, worker);
  }
  if (call_.adapters->t_size() > 0) {
    downs_.wait();
    up(tile, target);
  }
  if (call_.node.bias != nullptr) add_bias(tile, target);
}

// The slices that the tile touches, each with its own panel numbers.
void LinearJob::up(const Tile& tile, const Target& target) {
  int64_t row = 0;  // first row of the slice; a multiple of 16 but for a slice alone
  for (int64_t slice = 0; slice < weights_.slice_count; ++slice) {
    const int64_t first = row / kPanelRows;
    const int64_t last = first + ceil_div(weights_.slices[slice], kPanelRows);
    const int64_t from = std::max(tile.panel_begin, first);
    const int64_t to = std::min(tile.panel_end, last);
    if (from < to) up_slice(slice, row, {tile.row_begin, tile.row_end, from, to}, target);
    row += weights_.slices[slice];
  }
}

void LinearJob::up_slice(int64_t slice, int64_t slice_row, const Tile& tile,
                         const Target& target) {
  const int64_t first = slice_row / kPanelRows;
  for (int64_t m = tile.row_begin; m < tile.row_end; ++m) {
    const NodeAdapter* adapter = of_row(m);
    if (adapter == nullptr) continue;
    float* y = target.y + (m - tile.row_begin) * target.stride + slice_row;
    for (const Branch& branch : adapter->slices[static_cast<size_t>(slice)]) {
      const float* t = t_of(branch, m);
      if (is_packed(branch)) {
        const auto* codes = reinterpret_cast<const int16_t*>(t + 1);
        call_.kernels->side_branch_up_int8(*branch.packed, weights_.slices[slice], codes, *t,
                                           tile.panel_begin - first, tile.panel_end - first, y);
      } else {
        call_.kernels->side_branch_up(branch.factors, weights_.slices[slice], t,
                                      tile.panel_begin - first, tile.panel_end - first, y);
      }
    }
  }
}

void LinearJob::add_bias(const Tile& tile, const Target& target) {
  const int64_t from = tile.panel_begin * kPanelRows;
  const int64_t to = std::min(tile.panel_end * kPanelRows, weights_.out_features);
  for (int64_t m = 0; m < tile.row_end - tile.row_begin; ++m) {
    float* y = target.y + m * target.stride;
    for (int64_t i = from; i < to; ++i) y[i] += call_.node.bias[i];
  }
}

void LinearJob::add_residual(const Tile& tile) {
  const int64_t from = tile.panel_begin * kPanelRows;
  const int64_t to = std::min(tile.panel_end * kPanelRows, columns());
  for (int64_t m = tile.row_begin; m < tile.row_end; ++m) {
    float* y = call_.y + m * columns();
    const float* residual = call_.residual + m * columns();
    for (int64_t i = from; i < to; ++i) y[i] += residual[i];
  }
}

}  // namespace edgelora::ops
