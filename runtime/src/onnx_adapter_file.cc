#include "src/onnx_adapter_file.h"

#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include "src/error.h"
#include "src/flatbuffer.h"
#include "src/mapped_file.h"

namespace edgelora {
namespace {

// ONNX Runtime's adapter_schema.fbs: fields in the order of their tables.
constexpr const char* kIdentifier = "TORT";
enum AdapterField { kFormatVersion, kAdapterVersion, kModelVersion, kParameters };
enum ParameterField { kName, kDims, kDataType, kRawData };
constexpr int32_t kFormat = 1;
constexpr int32_t kFloat = 1;  // TensorDataType
constexpr int64_t kMaxDim = int64_t{1} << 26;

using Shapes = std::map<std::string, std::vector<int64_t>>;

class Check {
 public:
  Check(const std::string& path, const Targets& targets)
      : path_(path), targets_(targets), file_(path), buffer_(file_.data(), file_.size(), path) {}

  void run() {
    if (!buffer_.has_identifier(kIdentifier)) fail("not an ONNX Runtime adapter");
    const auto root = buffer_.root();
    const int32_t version = buffer_.int32(buffer_.field(root, kFormatVersion));
    if (version != kFormat) fail("format_version is " + std::to_string(version) + ", not 1");
    const auto parameters = buffer_.vector(buffer_.field(root, kParameters), 4);
    for (int64_t i = 0; i < parameters.length; ++i) parameter(buffer_.table(parameters, i));
    if (shapes_.empty()) fail("it changes no targets");
    size_t factors = 0;
    for (const auto& [target, features] : targets_) factors += target_factors(target, features);
    if (factors != shapes_.size()) fail("it has parameters of no linear of the base");
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(EDGELORA_BAD_FILE, path_ + ": " + what + "; export the bundle again");
  }

  void parameter(Flatbuffer::Place table) {
    const std::string name = buffer_.text(buffer_.field(table, kName));
    const std::vector<int64_t> dims = buffer_.int64s(buffer_.field(table, kDims));
    const auto data = buffer_.vector(buffer_.field(table, kRawData), 1);
    if (!shapes_.emplace(name, dims).second) fail(name + " is there twice");
    if (buffer_.int32(buffer_.field(table, kDataType)) != kFloat) fail(name + " is not float32");
    if (dims.size() != 2 || !is_dim(dims[0]) || !is_dim(dims[1])) fail(name + " is no matrix");
    if (data.length != 4 * dims[0] * dims[1]) fail(name + " has another number of bytes");
    if (data.first % 4 != 0) buffer_.damaged();
    check_finite(name, data);
  }

  static bool is_dim(int64_t dim) { return dim >= 1 && dim <= kMaxDim; }

  void check_finite(const std::string& name, const Flatbuffer::Vector& data) const {
    for (int64_t at = data.first; at < data.first + data.length; at += 4) {
      float value = 0;
      std::memcpy(&value, file_.data() + at, sizeof value);
      if (!std::isfinite(value)) fail(name + " has NaN or infinity");
    }
  }

  // How many of the target's factors there are: none or both.
  size_t target_factors(const std::string& target, const std::pair<int64_t, int64_t>& features) {
    const auto a = shapes_.find(target + ".lora_a");
    const auto b = shapes_.find(target + ".lora_b");
    if (a == shapes_.end() && b == shapes_.end()) return 0;
    if (a == shapes_.end() || b == shapes_.end()) fail(target + " lacks one of its factors");
    if (a->second[0] != features.first || b->second[1] != features.second ||
        a->second[1] != b->second[0]) {
      fail(target + ": the factors do not fit [" + std::to_string(features.second) + ", " +
           std::to_string(features.first) + "]");
    }
    return 2;
  }

  const std::string& path_;
  const Targets& targets_;
  MappedFile file_;
  Flatbuffer buffer_;
  Shapes shapes_;  // of each parameter
};

}  // namespace

void check_onnx_adapter_file(const std::string& path, const Targets& targets) {
  Check(path, targets).run();
}

}  // namespace edgelora
