#include "ops/linear_job.h"

#include <algorithm>
#include <new>

#include "kernels/ceil_div.h"
#include "ops/scratch.h"

namespace edgelora::ops {
namespace {

using kernels::ceil_div;

constexpr int64_t kPanelRows = kernels::kPanelRows;
constexpr int64_t kBlock = kernels::kActivationBlock;

// Groups of rows that a thread prepares, if all are as fast: evens out a thread that is late or
// slow.
constexpr int64_t kGroupsPerThread = 4;
// Values of a tile whose products are read once more, from the cache.
constexpr int64_t kTileValues = 16 * 1024;
// The smallest piece is this share of a thread's panels, of many rows.
constexpr int64_t kSmallestShare = 32;
// Panels of W that some kernels take together, of several rows.
constexpr int64_t kPanelsTogether = 2;
// Multiplications of a piece that are worth the taking: of one row 16 KB of codes, a microsecond.
constexpr int64_t kWorkPerPiece = 32 * 1024;

}  // namespace

LinearJob::LinearJob(const LinearCall& call) : call_(call), weights_(*call.weights) {
  plan();
  take_scratch();
}

int64_t LinearJob::columns() const {
  return call_.node.activation == Activation::kSwiGlu ? weights_.out_features / 2
                                                      : weights_.out_features;
}

void LinearJob::plan() {
  const double work = static_cast<double>(call_.panels * kPanelRows * weights_.in_features) *
                      static_cast<double>(call_.rows);  // may exceed int64 for absurd shapes
  const double shares = work / static_cast<double>(kWorkPerThread);
  target_panels_ = ceil_div(columns(), kPanelRows);
  workers_ = shares >= static_cast<double>(call_.threads)
                 ? call_.threads
                 : std::max<int64_t>(1, static_cast<int64_t>(shares));
  workers_ = std::min(workers_, target_panels_);
  const int64_t most = call_.kernels->strip_rows / code_rows();
  const int64_t fewest = most * 3 / 4;  // so each thread has some
  strips_ = std::clamp<int64_t>(call_.rows / fewest, 1,
                                ceil_div(ceil_div(call_.rows, most), workers_) * workers_);
  item_panels_ = call_.rows == 1 ? 1 : kPanelsTogether;
  strip_items_ = ceil_div(target_panels_, item_panels_);
  shares_.deal(strips_ * strip_items_, workers_, piece_items());
  row_groups_ = std::min(call_.rows, workers_ > 1 ? workers_ * kGroupsPerThread : 1);
  groups_.deal(call_.rows == 1 ? 0 : row_groups_, workers_, {1, 1});
  prepared_.expect(call_.rows == 1 ? 0 : row_groups_);
  const int64_t downs = call_.rows == 1 ? weights_.slice_count : row_groups_;
  downs_.expect(call_.adapters->t_size() > 0 ? downs : 0);
}

// Whoever takes from another's strip rearranges its rows anew.
Shares::Sizes LinearJob::piece_items() const {
  const int64_t all = std::max<int64_t>(1, strips_ * strip_items_);
  if (workers_ == 1) return {all, all};
  const int64_t least = call_.rows == 1 ? kWorkPerPiece / (kPanelRows * weights_.in_features)
                                        : ceil_div(all, workers_ * kSmallestShare);
  return {std::max<int64_t>(1, least), all};
}

int64_t LinearJob::strip_begin(int64_t strip) const { return call_.rows * strip / strips_; }

// A multiple of item_panels_, if it is not all of them.
int64_t LinearJob::tile_panels() const {
  if (products_of_tile() == 0 && !refined()) return target_panels_;
  const int64_t most = kTileValues / (ceil_div(call_.rows, strips_) * kPanelRows);
  return std::min(target_panels_, std::max<int64_t>(1, most / item_panels_) * item_panels_);
}

void LinearJob::take_scratch() {
  const bool taken = take_pieces(ScratchUse::kCall, [this](Pieces& pieces) {
    if (call_.rows > 1) shared_ = place_prepared(pieces);
    t_ = pieces.take<float>(call_.rows * call_.adapters->t_size());
  });
  if (!taken) throw std::bad_alloc();
}

bool LinearJob::take_worker(Worker* worker) const {
  const int64_t tile = ceil_div(call_.rows, strips_) * tile_panels() * kPanelRows;
  return take_pieces(ScratchUse::kWorker, [&](Pieces& pieces) {
    worker->x = call_.rows > 1 ? shared_ : place_prepared(pieces);
    worker->normed = pieces.take<float>(call_.node.norm != nullptr ? weights_.in_features : 0);
    worker->linear = pieces.take<char>(kernels::linear_scratch_bytes(weights_));
    worker->products = pieces.take<float>(products_of_tile() * tile);
    worker->rest = pieces.take<float>(refined() ? weights_.in_features : 0);
    worker->pairs = pieces.take<float>(refined() ? 2 * tile : 0);
  });
}

LinearJob::Prepared LinearJob::place_prepared(Pieces& pieces) const {
  const int64_t rows = call_.rows, blocks = ceil_div(weights_.in_features, kBlock);
  Prepared x{};
  if (normed_rows()) x.normed = pieces.take<float>(rows * weights_.in_features);
  if (call_.exact) return x;
  x.codes = pieces.take<int8_t>(rows * code_rows() * blocks * kBlock);
  x.scales = pieces.take<float>(rows * code_rows() * blocks);
  x.sums = pieces.take<int32_t>(rows * code_rows() * blocks);
  return x;
}

void LinearJob::run(Crews* crews) {
  crews->run(workers_, workers_, *this);
  if (out_of_memory_.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

void LinearJob::operator()(int64_t ticket) {
  Worker worker{};
  if (!take_worker(&worker)) return out_of_memory_.store(true, std::memory_order_relaxed);
  prepare(ticket, worker);
  for (int64_t i; downs_.take(&i);) {
    down(worker, i);
    downs_.finish_one();
  }
  for (Shares::Piece piece; shares_.take(ticket, &piece);) {
    while (piece.begin < piece.end) {
      const Tile tile = first_tile(piece);
      compute(worker, tile);
      piece.begin += ceil_div(tile.panel_end - tile.panel_begin, item_panels_);
    }
  }
}

void LinearJob::prepare(int64_t ticket, const Worker& worker) {
  if (call_.rows == 1) return prepare_rows(worker, 0, 1);
  for (Shares::Piece group; groups_.take(ticket, &group);) {
    prepare_rows(worker, group_begin(group.begin), group_begin(group.end));
    prepared_.finish_one();
  }
  prepared_.wait();
}

int64_t LinearJob::group_begin(int64_t group) const { return call_.rows * group / row_groups_; }

const float* LinearJob::input_row(const Prepared& x, int64_t row) const {
  return (call_.node.norm == nullptr ? call_.x : x.normed) + row * weights_.in_features;
}

void LinearJob::prepare_rows(const Worker& worker, int64_t begin, int64_t end) const {
  const Prepared& x = worker.x;
  const int64_t k = weights_.in_features;
  for (int64_t m = begin; m < end; ++m) {
    const float* row = call_.x + m * k;
    if (call_.node.norm != nullptr) {
      float* normed = normed_rows() ? x.normed + m * k : worker.normed;
      call_.kernels->rms_norm(row, call_.node.norm, k, call_.node.epsilon, normed);
      row = normed;
    }
    if (!call_.exact) round_row(worker, row, m);
  }
}

void LinearJob::round_row(const Worker& worker, const float* row, int64_t m) const {
  const int64_t k = weights_.in_features, blocks = ceil_div(k, kBlock);
  const kernels::KernelTable& kernels = *call_.kernels;
  const auto quantize = groups_scales() ? kernels.quantize_groups : kernels.quantize_activations;
  const auto round = [&](const float* from, int64_t to) {
    quantize(from, k, worker.x.codes + to * kBlock, worker.x.scales + to, worker.x.sums + to);
  };
  const int64_t first = m * code_rows() * blocks;
  round(row, first);
  if (!refined()) return;
  const int8_t* codes = worker.x.codes + first * kBlock;
  const float* scales = worker.x.scales + first;
  for (int64_t i = 0; i < k; ++i) {
    worker.rest[i] = row[i] - scales[i / kBlock] * static_cast<float>(codes[i]);
  }
  round(worker.rest, first + blocks);
}

// The rows from wanted.row on, about to be rearranged in the worker's scratch if it does not hold
// them so.
kernels::Activations LinearJob::quantized(Worker& worker, Kept wanted, int64_t row_end) const {
  const Prepared& x = worker.x;
  const int64_t block = wanted.row * code_rows() * ceil_div(weights_.in_features, kBlock);
  const bool kept = worker.kept.row == wanted.row && worker.kept.for_a == wanted.for_a;
  worker.kept = wanted;
  return {(row_end - wanted.row) * code_rows(),
          x.codes + block * kBlock,
          x.scales + block,
          x.sums + block,
          kept,
          groups_scales()};
}

// Of one row, without those of what they miss.
kernels::Activations LinearJob::first_codes(Worker& worker, int64_t row) const {
  kernels::Activations x = quantized(worker, {row, true}, row + 1);
  worker.kept = {};
  x.rows = 1;
  x.kept = false;
  return x;
}

// Items are the panels of the first strip, of the second…, some of them each.
LinearJob::Tile LinearJob::first_tile(const Shares::Piece& items) const {
  const int64_t strip = items.begin / strip_items_, first = strip * strip_items_;
  const int64_t begin = (items.begin - first) * item_panels_;
  const int64_t end =
      std::min({(items.end - first) * item_panels_, target_panels_, begin + tile_panels()});
  return {strip_begin(strip), strip_begin(strip + 1), begin, end};
}

void LinearJob::compute(Worker& worker, const Tile& tile) const {
  if (call_.node.activation == Activation::kSwiGlu) {
    swiglu_tile(worker, tile);
    if (call_.residual != nullptr) add_residual(tile, y_of(tile));
  } else if (call_.residual != nullptr) {
    residual_tile(worker, tile);
  } else {
    product(worker, tile, y_of(tile));
  }
}

// gate is the first half of W's rows, up the second.
void LinearJob::swiglu_tile(Worker& worker, const Tile& tile) const {
  const int64_t width = (tile.panel_end - tile.panel_begin) * kPanelRows;
  float *gate = worker.products, *up = gate + (tile.row_end - tile.row_begin) * width;
  const int64_t first = tile.panel_begin * kPanelRows;
  product(worker, tile, {gate - first, width});
  const Tile shifted{tile.row_begin, tile.row_end, target_panels_ + tile.panel_begin,
                     target_panels_ + tile.panel_end};
  product(worker, shifted, {up - first - columns(), width});
  for (int64_t m = tile.row_begin; m < tile.row_end; ++m) {
    const int64_t row = (m - tile.row_begin) * width;
    call_.kernels->swiglu(gate + row, up + row, width, call_.y + m * columns() + first);
  }
}

void LinearJob::residual_tile(Worker& worker, const Tile& tile) const {
  const int64_t first = tile.panel_begin * kPanelRows;
  const int64_t width = (tile.panel_end - tile.panel_begin) * kPanelRows;
  const Target products{worker.products - first, width};
  product(worker, tile, products);
  add_residual(tile, products);
}

void LinearJob::product(Worker& worker, const Tile& tile, const Target& target) const {
  const int64_t rows = tile.row_end - tile.row_begin;
  if (call_.exact) {
    call_.kernels->linear_float(weights_, input_row(worker.x, tile.row_begin), rows,
                                tile.panel_begin, tile.panel_end, target.y, target.stride,
                                worker.linear);
  } else if (refined()) {
    refined_product(worker, tile, target);
  } else {
    call_.kernels->linear(weights_, quantized(worker, {tile.row_begin, false}, tile.row_end),
                          tile.panel_begin, tile.panel_end, target.y, target.stride, worker.linear);
  }
  if (call_.adapters->t_size() > 0) {
    downs_.wait();
    up(tile, target);
  }
  if (call_.node.bias != nullptr) add_bias(tile, target);
}

void LinearJob::refined_product(Worker& worker, const Tile& tile, const Target& target) const {
  const int64_t first = tile.panel_begin * kPanelRows;
  const int64_t width = std::min(tile.panel_end * kPanelRows, weights_.out_features) - first;
  call_.kernels->linear(weights_, quantized(worker, {tile.row_begin, false}, tile.row_end),
                        tile.panel_begin, tile.panel_end, worker.pairs - first, width,
                        worker.linear);
  for (int64_t m = 0; m < tile.row_end - tile.row_begin; ++m) {
    const float* pair = worker.pairs + 2 * m * width;
    float* y = target.y + m * target.stride + first;
    for (int64_t i = 0; i < width; ++i) y[i] = pair[i] + pair[width + i];
  }
}

void LinearJob::add_bias(const Tile& tile, const Target& target) const {
  const int64_t from = tile.panel_begin * kPanelRows;
  const int64_t to = std::min(tile.panel_end * kPanelRows, weights_.out_features);
  for (int64_t m = 0; m < tile.row_end - tile.row_begin; ++m) {
    float* y = target.y + m * target.stride;
    for (int64_t i = from; i < to; ++i) y[i] += call_.node.bias[i];
  }
}

// y = what lies at `from`, which may be y, + the residual, which may be y too.
void LinearJob::add_residual(const Tile& tile, const Target& from) const {
  const int64_t begin = tile.panel_begin * kPanelRows;
  const int64_t end = std::min(tile.panel_end * kPanelRows, columns());
  for (int64_t m = tile.row_begin; m < tile.row_end; ++m) {
    const float* values = from.y + (m - tile.row_begin) * from.stride;
    const float* residual = call_.residual + m * columns();
    float* y = call_.y + m * columns();
    for (int64_t i = begin; i < end; ++i) y[i] = values[i] + residual[i];
  }
}

}  // namespace edgelora::ops
