#include "ops/packed_weights.h"

#include <initializer_list>
#include <new>
#include <utility>

#include "kernels/ceil_div.h"
#include "kernels/half.h"
#include "ops/file_pages.h"
#include "ops/scratch.h"
#include "src/element_type.h"

namespace edgelora::ops {
namespace {

using kernels::ceil_div;
using kernels::Format;
using kernels::has_codebook;
using kernels::Rounding;

constexpr int64_t kPanelRows = kernels::kPanelRows;
constexpr int64_t kAbsmaxBlock = 64;
constexpr int64_t kAbsmaxGroup = 256;                // absmax codes that share a nested_absmax
constexpr int64_t kAbsmaxTable = 256;                // values of a code
constexpr int64_t kLargestDimension = INT32_MAX;  // so that no product of two overflows

constexpr ONNXTensorElementDataType kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr ONNXTensorElementDataType kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
constexpr ONNXTensorElementDataType kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr ONNXTensorElementDataType kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

[[noreturn]] void refuse(const std::string& message) { throw Error(EDGELORA_BAD_FILE, message); }

Shape shape_of(std::initializer_list<int64_t> dims) {
  Shape shape;
  for (const int64_t dim : dims) shape.dims[shape.rank++] = dim;
  return shape;
}

// The data of a tensor that must have this type and shape.
const void* expect(const Tensor& tensor, const char* what, ONNXTensorElementDataType type,
                   const Shape& shape) {
  if (tensor.type != type || !(tensor.shape == shape)) {
    refuse(std::string(what) + " is " + name_of(tensor.type) + " " + to_string(tensor.shape) +
           ", expected " + name_of(type) + " " + to_string(shape));
  }
  return tensor.data;
}

Tensor required(const NodeInfo& node, size_t index, const char* what) {
  const std::optional<Tensor> tensor = node.constant(index, what);
  if (!tensor) refuse(std::string(what) + " is missing");
  return *tensor;
}

struct Kind {
  const char* name;
  Format format;
  Rounding rounding;
};

constexpr Kind kKinds[] = {
    {"int4", Format::kInt4, Rounding::kNone},
    {"int8", Format::kInt8, Rounding::kNone},
    {"nf4", Format::kNf4, Rounding::kNone},
    {"nf4_bfloat16", Format::kNf4, Rounding::kBfloat16},
    {"nf4_float16", Format::kNf4, Rounding::kFloat16},
    {"fp4", Format::kFp4, Rounding::kNone},
    {"fp4_bfloat16", Format::kFp4, Rounding::kBfloat16},
    {"fp4_float16", Format::kFp4, Rounding::kFloat16},
    {"float", Format::kFloat, Rounding::kNone},
};

const Kind& parse_kind(const std::string& text) {
  std::string names;
  for (const Kind& kind : kKinds) {
    if (text == kind.name) return kind;
    names += std::string(names.empty() ? "" : ", ") + kind.name;
  }
  refuse("format is \"" + text + "\", expected one of " + names);
}

int64_t dimension(const NodeInfo& node, const char* attribute) {
  const int64_t value = node.integer(attribute);
  if (value < 1 || value > kLargestDimension) {
    refuse(std::string(attribute) + " is " + std::to_string(value) + ", expected 1 to " +
           std::to_string(kLargestDimension));
  }
  return value;
}

int64_t read_block_size(const NodeInfo& node, Format format) {
  if (format == Format::kFloat) return 0;
  const int64_t size = node.integer("block_size");
  if (has_codebook(format) && size != kAbsmaxBlock) {
    refuse("block_size is " + std::to_string(size) + ", nf4 and fp4 have 64");
  }
  if (size != 32 && size != 64 && size != 128) {
    refuse("block_size is " + std::to_string(size) + ", expected 32, 64 or 128");
  }
  return size;
}

}  // namespace

PackedWeights::PackedWeights(const NodeInfo& node, size_t codes_index, std::vector<int64_t> slices)
    : slices_(std::move(slices)) {
  const Kind& kind = parse_kind(node.text("format"));
  weights_.format = kind.format;
  weights_.rounding = kind.rounding;
  weights_.in_features = dimension(node, "in_features");
  weights_.out_features = dimension(node, "out_features");
  weights_.block_size = read_block_size(node, weights_.format);
  check_slices();
  weights_.slices = slices_.data();
  weights_.slice_count = static_cast<int64_t>(slices_.size());
  panels_ = ceil_div(weights_.out_features, kPanelRows);
  read_codes(node, codes_index);
  if (has_codebook(weights_.format)) {
    read_absmax(node, codes_index + 1);
    return;
  }
  refuse_surplus(node, codes_index + 3, {"absmax_offset", "absmax_table"});
  if (weights_.format == Format::kFloat) {
    refuse_surplus(node, codes_index + 1, {"scales", "zero_points"});
    return;
  }
  blocks_ = ceil_div(weights_.in_features, weights_.block_size);
  read_scales(node, codes_index + 1);
  read_zero_points(node, codes_index + 2);
}

// Inputs from `index` on that this format does not have.
void PackedWeights::refuse_surplus(const NodeInfo& node, size_t index,
                                   std::initializer_list<const char*> names) const {
  for (const char* name : names) {
    if (!node.has_input(index++)) continue;
    refuse(std::string(name) + " is given, which " + node.text("format") + " does not have");
  }
}

void PackedWeights::check_slices() const {
  int64_t rest = weights_.out_features;
  for (const int64_t slice : slices_) {
    if (slice < 1 || slice > rest) refuse("slices do not add up to out_features");
    if (slices_.size() > 1 && slice % kPanelRows != 0) {
      refuse("a slice has " + std::to_string(slice) + " rows, not a multiple of 16");
    }
    rest -= slice;
  }
  if (rest != 0) refuse("slices do not add up to out_features");
}

void PackedWeights::read_codes(const NodeInfo& node, size_t index) {
  const int64_t k = weights_.in_features;
  const int64_t padded = ceil_div(k, kernels::kActivationBlock) * kernels::kActivationBlock;
  const Tensor codes = required(node, index, "codes");
  switch (weights_.format) {
    case Format::kFloat:
      weights_.codes = expect(codes, "codes", kFloat, shape_of({panels_, k, kPanelRows}));
      return;
    case Format::kInt8:
      weights_.codes = expect(codes, "codes", kInt8, shape_of({panels_, padded / 4, 64}));
      return;
    default:
      weights_.codes = expect(codes, "codes", kUint8, shape_of({panels_, padded / 8, 64}));
  }
}

void PackedWeights::read_scales(const NodeInfo& node, size_t index) {
  const Tensor scales = required(node, index, "scales");
  weights_.scales = static_cast<const uint16_t*>(
      expect(scales, "scales", kHalf, shape_of({panels_, blocks_, kPanelRows})));
}

void PackedWeights::read_zero_points(const NodeInfo& node, size_t index) {
  const std::optional<Tensor> tensor = node.constant(index, "zero_points");
  if (!tensor) return;
  if (weights_.format == Format::kInt8) refuse("int8 has no zero_points");
  if (tensor->type == kFloat) return read_exact_offsets(*tensor);
  const bool offsets = tensor->type == kHalf;
  weights_.format = offsets ? Format::kInt4Offsets : Format::kInt4ZeroPoints;
  weights_.zero_points =
      offsets ? expect(*tensor, "offsets", kHalf, shape_of({panels_, blocks_, kPanelRows}))
              : expect(*tensor, "zero_points", kUint8, shape_of({panels_, blocks_, 8}));
}

// `linear` gets them in float16.
void PackedWeights::read_exact_offsets(const Tensor& tensor) {
  const int64_t count = panels_ * blocks_ * kPanelRows;
  weights_.exact_offsets = static_cast<const float*>(
      expect(tensor, "offsets", kFloat, shape_of({panels_, blocks_, kPanelRows})));
  offsets_.resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    offsets_[static_cast<size_t>(i)] = kernels::float_to_half(weights_.exact_offsets[i]);
  }
  give_back_file_pages(weights_.exact_offsets, count * 4);
  weights_.format = Format::kInt4Offsets;
  weights_.zero_points = offsets_.data();
}

void PackedWeights::read_absmax(const NodeInfo& node, size_t index) {
  if (weights_.in_features % kernels::kActivationBlock != 0) {
    refuse("nf4 and fp4 need in_features to be a multiple of 32");
  }
  // out_features and in_features are below 2^31: no product overflows.
  int64_t& groups = absmax_groups_;
  for (const int64_t slice : slices_) {
    groups += ceil_div(ceil_div(slice * weights_.in_features, kAbsmaxBlock), kAbsmaxGroup);
  }
  const auto floats = [&](size_t i, const char* what, int64_t count) {
    return static_cast<const float*>(
        expect(required(node, i, what), what, kFloat, shape_of({count})));
  };
  if (!node.has_input(index + 1)) {  // absmax is not quantized
    weights_.nested_absmax = floats(index, "absmax", groups * kAbsmaxGroup);
    return refuse_surplus(node, index + 2, {"absmax_offset", "absmax_table"});
  }
  weights_.nested_absmax = floats(index, "nested_absmax", groups);
  weights_.absmax = static_cast<const uint8_t*>(expect(
      required(node, index + 1, "absmax"), "absmax", kUint8, shape_of({groups * kAbsmaxGroup})));
  weights_.absmax_offset = floats(index + 2, "absmax_offset", weights_.slice_count);
  weights_.absmax_table = floats(index + 3, "absmax_table", kAbsmaxTable);
}

void PackedWeights::unpack_absmax(const kernels::KernelTable& kernels) {
  if (!has_codebook(weights_.format)) return;
  weights_.scale_unit = kernels::absmax_scale_unit(weights_);
  const int64_t count = kernels::absmax_panel_scales(weights_);
  absmax_scales_.resize(static_cast<size_t>(panels_ * count));
  void* memory = scratch(ScratchUse::kWorker, kernels::linear_scratch_bytes(weights_));
  if (memory == nullptr) throw std::bad_alloc();
  for (int64_t p = 0; p < panels_; ++p) {
    kernels.unpack_absmax(weights_, p, absmax_scales_.data() + p * count, memory);
  }
  weights_.scales = absmax_scales_.data();
  give_back_absmax();
}

void PackedWeights::give_back_absmax() const {
  const int64_t codes = absmax_groups_ * kAbsmaxGroup;
  if (weights_.absmax == nullptr) return give_back_file_pages(weights_.nested_absmax, codes * 4);
  give_back_file_pages(weights_.absmax, codes);
  give_back_file_pages(weights_.nested_absmax, absmax_groups_ * 4);
  give_back_file_pages(weights_.absmax_offset, weights_.slice_count * 4);
  give_back_file_pages(weights_.absmax_table, kAbsmaxTable * 4);
}

}  // namespace edgelora::ops
