#include "src/adapter_file.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "src/error.h"
#include "src/json_fields.h"
#include "src/safetensors.h"

namespace edgelora {
namespace {

constexpr int64_t kPanelRows = kernels::kPanelRows;
constexpr int64_t kLargestRank = 65536;
constexpr const char* kFormat = "edgelora-adapter";
constexpr const char* kFormatVersion = "1";
constexpr size_t kNamesInMessage = 4;
constexpr const char* kPrefixKeys = "prefix.keys";
constexpr const char* kPrefixValues = "prefix.values";

using Scalings = std::map<std::string, float>;  // by target

[[noreturn]] void refuse(const std::string& path, const std::string& what,
                         const char* advice = "export the adapter again") {
  throw Error(EDGELORA_BAD_FILE, path + ": " + what + "; " + advice);
}

const std::string& field(const std::string& path, const Metadata& metadata, const char* key) {
  const auto found = metadata.find(key);
  if (found == metadata.end()) refuse(path, std::string("no ") + key + " in its metadata");
  return found->second;
}

void check_metadata(const std::string& path, const Metadata& metadata,
                    const std::string& base_fingerprint) {
  const auto format = metadata.find("format");
  if (format == metadata.end() || format->second != kFormat) {
    refuse(path, "not an EdgeLoRA adapter", "make one with edgelora export or add-adapter");
  }
  const std::string& version = field(path, metadata, "format_version");
  if (version != kFormatVersion) {
    refuse(path, "format_version is " + version + ", this library reads 1", "update edgelora");
  }
  field(path, metadata, "name");
  const std::string& found = field(path, metadata, "base_fingerprint");
  if (found != base_fingerprint) {
    refuse(path, "made for the base " + found + ", the model is " + base_fingerprint,
           "use the base it was exported for");
  }
}

Scalings parse_scalings(const std::string& path, const SafeTensors& file) {
  const std::string& text = field(path, file.metadata, "scaling");
  const auto json =
      parse_json_object(path + ": scaling", text.data(), text.data() + text.size(), 1);
  Scalings scalings;
  for (const auto& [target, value] : json.items()) {
    const double scaling = value.is_number() ? value.get<double>() : std::nan("");
    if (!(std::abs(scaling) <= std::numeric_limits<float>::max())) {
      refuse(path, "scaling of " + target + " is not a finite number");
    }
    scalings[target] = static_cast<float>(scaling);
  }
  return scalings;
}

std::vector<int32_t> parse_invocation(const std::string& path, const SafeTensors& file) {
  const auto found = file.metadata.find("activation");
  if (found == file.metadata.end()) return {};
  const std::string& text = found->second;
  const std::string where = path + ": activation";
  const auto json = parse_json_object(where, text.data(), text.data() + text.size(), 2);
  return JsonFields(json, where).tokens("invocation_tokens");
}

void check_all_known(const std::string& path, const Scalings& scalings, const Targets& targets) {
  std::string names;
  size_t count = 0;
  for (const auto& [target, scaling] : scalings) {
    if (targets.count(target) != 0) continue;
    if (++count <= kNamesInMessage) names += (names.empty() ? "" : ", ") + target;
  }
  if (count > kNamesInMessage) names += " and " + std::to_string(count - kNamesInMessage) + " more";
  if (count > 0) refuse(path, "the model has no linear " + names, "use the base it was made for");
}

const SafeTensor& factor(const std::string& path, const SafeTensors& file,
                         const std::string& name) {
  const auto found = file.tensors.find(name);
  if (found == file.tensors.end()) refuse(path, name + " is missing");
  return found->second;
}

std::string to_string(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t dim : shape) text += (text.empty() ? "" : ", ") + std::to_string(dim);
  return "[" + text + "]";
}

void check_shapes(const std::string& path, const std::string& target, const SafeTensor& a,
                  const SafeTensor& b, const SideBranch& branch) {
  const int64_t rank = a.shape.empty() ? 0 : a.shape[0];
  const int64_t panels = (branch.out_features + kPanelRows - 1) / kPanelRows;
  if (rank < 1 || rank > kLargestRank) {
    refuse(path, target + ".lora_a is " + to_string(a.shape) + ", its rank must be 1 to " +
                     std::to_string(kLargestRank));
  }
  const std::vector<int64_t> expected_a{rank, branch.in_features};
  const std::vector<int64_t> expected_b{panels, rank, kPanelRows};
  if (a.shape != expected_a) {
    refuse(path,
           target + ".lora_a is " + to_string(a.shape) + ", expected " + to_string(expected_a));
  }
  if (b.shape != expected_b) {
    refuse(path,
           target + ".lora_b is " + to_string(b.shape) + ", expected " + to_string(expected_b));
  }
  if (a.dtype != b.dtype) refuse(path, target + " has one factor in F16 and one in F32");
}

// Bits without the sign; NaN and infinity have all exponent bits set. Unaligned.
template <typename Bits>
Bits magnitude(const uint8_t* data, int64_t index) {
  Bits bits;
  std::memcpy(&bits, data + index * static_cast<int64_t>(sizeof(Bits)), sizeof(Bits));
  return static_cast<Bits>(bits & (std::numeric_limits<Bits>::max() >> 1));
}

template <typename Bits>
bool all_finite(const SafeTensor& tensor, Bits infinity) {
  const int64_t count = tensor.bytes / static_cast<int64_t>(sizeof(Bits));
  Bits largest = 0;  // no early exit: this form runs at memory speed
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, magnitude<Bits>(tensor.data, i));
  return largest < infinity;
}

void check_finite(const std::string& path, const std::string& name, const SafeTensor& tensor) {
  const bool finite = tensor.dtype == "F16" ? all_finite<uint16_t>(tensor, 0x7c00)
                                            : all_finite<uint32_t>(tensor, 0x7f800000);
  if (!finite) refuse(path, name + " holds NaN or infinity", "train or export the adapter again");
}

template <typename Bits>
bool zero_padding(const SafeTensor& b, int64_t rank, int64_t used_rows) {
  const int64_t last = (b.shape[0] - 1) * rank * kPanelRows;  // first value of the last panel
  for (int64_t i = 0; i < rank * kPanelRows; ++i) {
    if (i % kPanelRows >= used_rows && magnitude<Bits>(b.data, last + i) != 0) return false;
  }
  return true;
}

void check_padding(const std::string& path, const std::string& name, const SafeTensor& b,
                   const SideBranch& branch) {
  const int64_t used = branch.out_features - (b.shape[0] - 1) * kPanelRows;  // of the last panel
  const int64_t rank = branch.factors.rank;
  const bool zero = branch.factors.half ? zero_padding<uint16_t>(b, rank, used)
                                        : zero_padding<uint32_t>(b, rank, used);
  if (!zero) refuse(path, name + " has values in its padding rows");
}

// A float32 for each row; null if the target has none.
const void* read_rows(const std::string& path, const SafeTensors& file, const std::string& name,
                      int64_t out_features) {
  const auto found = file.tensors.find(name);
  if (found == file.tensors.end()) return nullptr;
  const SafeTensor& tensor = found->second;
  if (tensor.dtype != "F32" || tensor.shape != std::vector<int64_t>{out_features}) {
    refuse(path, name + " is " + tensor.dtype + " " + to_string(tensor.shape) + ", expected F32 " +
                     to_string({out_features}));
  }
  check_finite(path, name, tensor);
  return tensor.data;
}

void read_factors(const std::string& path, const SafeTensors& file, const std::string& target,
                  SideBranch* branch) {
  const SafeTensor& a = factor(path, file, target + ".lora_a");
  const SafeTensor& b = factor(path, file, target + ".lora_b");
  check_shapes(path, target, a, b, *branch);
  check_finite(path, target + ".lora_a", a);
  check_finite(path, target + ".lora_b", b);
  branch->factors = {a.dtype == "F16", a.shape[0], a.data, b.data};
  check_padding(path, target + ".lora_b", b, *branch);
}

// Of its factors in int8; 0 where they are not used.
int64_t packed_bytes(const SideBranch& branch) {
  const kernels::Factors& factors = branch.factors;
  if (!factors.half || factors.rank == 0 || factors.rank > kernels::kMostPackedRank) return 0;
  return PackedFactors::bytes(factors.rank, branch.in_features, branch.out_features);
}

// A target needs both factors, unless it has a float for each row and neither.
bool has_rows_alone(const SafeTensors& file, const std::string& target) {
  const auto has = [&](const char* tensor) { return file.tensors.count(target + tensor) != 0; };
  return (has(".bias") || has(".row_factor")) && !has(".lora_a") && !has(".lora_b");
}

SideBranch make_branch(const std::string& path, const SafeTensors& file, const std::string& target,
                       float scaling, const std::pair<int64_t, int64_t>& size) {
  SideBranch branch{};
  branch.in_features = size.first;
  branch.out_features = size.second;
  branch.scaling = scaling;
  branch.bias = read_rows(path, file, target + ".bias", size.second);
  branch.row_factors = read_rows(path, file, target + ".row_factor", size.second);
  if (!has_rows_alone(file, target)) read_factors(path, file, target, &branch);
  return branch;
}

bool is_prefix(const std::string& name) { return name == kPrefixKeys || name == kPrefixValues; }

bool has_prefix(const SafeTensors& file) {
  return file.tensors.count(kPrefixKeys) != 0 || file.tensors.count(kPrefixValues) != 0;
}

void check_prefix_shape(const std::string& path, const char* name, const SafeTensor& tensor,
                        const PrefixShape& shape, int64_t positions) {
  const std::vector<int64_t> expected{shape.layers, shape.heads, positions, shape.head_dim};
  if (tensor.shape != expected || positions < 1) {
    refuse(path, std::string(name) + " is " + to_string(tensor.shape) + ", the model needs [" +
                     std::to_string(shape.layers) + ", " + std::to_string(shape.heads) +
                     ", positions, " + std::to_string(shape.head_dim) + "]");
  }
  check_finite(path, name, tensor);
}

Prefix read_prefix(const std::string& path, const SafeTensors& file, const Scalings& scalings,
                   const PrefixShape& shape) {
  const SafeTensor& keys = factor(path, file, kPrefixKeys);
  const SafeTensor& values = factor(path, file, kPrefixValues);
  const int64_t positions = keys.shape.size() == 4 ? keys.shape[2] : 0;
  check_prefix_shape(path, kPrefixKeys, keys, shape, positions);
  check_prefix_shape(path, kPrefixValues, values, shape, positions);
  if (keys.dtype != values.dtype) refuse(path, "its prefix is in F16 and in F32");
  if (!scalings.empty()) refuse(path, "it has a prefix and targets, of which only one can be");
  return {shape, positions, keys.dtype == "F16", keys.data, values.data};
}

// Every tensor must belong to a target with a scaling; missing ones are found by make_branch.
void check_no_others(const std::string& path, const SafeTensors& file, const Scalings& scalings) {
  for (const auto& [name, tensor] : file.tensors) {
    if (is_prefix(name)) continue;
    const size_t dot = name.rfind('.');
    const std::string suffix = dot == std::string::npos ? "" : name.substr(dot);
    const bool known = suffix == ".lora_a" || suffix == ".lora_b" || suffix == ".row_factor" ||
                       suffix == ".bias";
    if (!known || scalings.count(name.substr(0, dot)) == 0) {
      refuse(path, name + " is a factor of no target that has a scaling");
    }
  }
}

}  // namespace

AdapterFile::AdapterFile(const std::string& path, const std::string& base_fingerprint,
                         const Targets& targets, const PrefixShape& shape)
    : file_(path), base_fingerprint_(base_fingerprint) {
  const auto check = [&](const Metadata& metadata) {
    check_metadata(path, metadata, base_fingerprint);
  };
  const SafeTensors file = parse_safetensors(path, file_.data(), file_.size(), check);
  const Scalings scalings = parse_scalings(path, file);
  invocation_ = parse_invocation(path, file);
  if (has_prefix(file)) prefix_ = read_prefix(path, file, scalings, shape);
  if (prefix_ && !invocation_.empty()) refuse(path, "its prefix cannot wait for invocation tokens");
  if (!prefix_ && scalings.empty()) refuse(path, "it has no targets");
  check_all_known(path, scalings, targets);
  check_no_others(path, file, scalings);
  for (const auto& [target, scaling] : scalings) {
    branches_.emplace(target, make_branch(path, file, target, scaling, targets.at(target)));
  }
  pack();
}

// In one piece of memory, a layer's beside each other.
void AdapterFile::pack() {
  int64_t bytes = 0;
  for (const auto& [target, branch] : branches_) bytes += packed_bytes(branch);
  packed_.emplace(static_cast<size_t>(bytes));
  uint8_t* memory = packed_->data();
  for (auto& [target, branch] : branches_) {
    if (packed_bytes(branch) == 0) continue;
    branch.packed = std::make_shared<const PackedFactors>(branch.factors, branch.in_features,
                                                          branch.out_features, memory);
    memory += packed_bytes(branch);
  }
}

const SideBranch* AdapterFile::branch(const std::string& target) const {
  const auto found = branches_.find(target);
  return found == branches_.end() ? nullptr : &found->second;
}

}  // namespace edgelora
