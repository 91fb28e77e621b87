#include "ops/ort.h"

#include <algorithm>
#include <memory>

namespace edgelora::ops {
namespace {

// Throws Error that names the attribute.
void check_attribute(const OrtApi& api, OrtStatus* status, const std::string& attribute) {
  if (status == nullptr) return;
  api.ReleaseStatus(status);
  throw Error(EDGELORA_BAD_FILE,
              std::string("attribute ") + attribute + " is missing or has the wrong type");
}

}  // namespace

int64_t Shape::elements() const {
  int64_t product = 1;
  for (size_t i = 0; i < rank; ++i) {
    if (dims[i] < 0 || __builtin_mul_overflow(product, dims[i], &product)) {
      throw Error(EDGELORA_BAD_FILE, "a tensor of shape " + to_string(*this) + " is too large");
    }
  }
  return product;
}

bool operator==(const Shape& left, const Shape& right) {
  return left.rank == right.rank && std::equal(left.dims, left.dims + left.rank, right.dims);
}

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.rank; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape.dims[i]);
  }
  return text + "]";
}

Tensor view(const OrtApi& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check_ort(api, api.GetTensorTypeAndShape(value, &raw));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api.ReleaseTensorTypeAndShapeInfo)>
      info(raw, api.ReleaseTensorTypeAndShapeInfo);
  Tensor tensor{};
  check_ort(api, api.GetTensorElementType(raw, &tensor.type));
  check_ort(api, api.GetDimensionsCount(raw, &tensor.shape.rank));
  if (tensor.shape.rank > Shape::kMaxRank) {
    throw Error(EDGELORA_BAD_FILE, "a tensor has more than 8 dimensions");
  }
  check_ort(api, api.GetDimensions(raw, tensor.shape.dims, tensor.shape.rank));
  void* data = nullptr;  // the C API has no const accessor; we only read
  check_ort(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

std::optional<Tensor> optional_input(const OrtApi& api, const OrtKernelContext* context,
                                     size_t index) {
  const OrtValue* value = nullptr;
  check_ort(api, api.KernelContext_GetInput(context, index, &value));
  if (value == nullptr) return std::nullopt;
  return view(api, value);
}

Tensor input(const OrtApi& api, const OrtKernelContext* context, size_t index) {
  const std::optional<Tensor> tensor = optional_input(api, context, index);
  if (tensor) return *tensor;
  throw Error(EDGELORA_INVALID_ARGUMENT, "input " + std::to_string(index) + " is missing");
}

void* output(const OrtApi& api, OrtKernelContext* context, size_t index, const Shape& shape) {
  OrtValue* value = nullptr;
  check_ort(api, api.KernelContext_GetOutput(context, index, shape.dims, shape.rank, &value));
  void* data = nullptr;
  check_ort(api, api.GetTensorMutableData(value, &data));
  return data;
}

float* float_output(const OrtApi& api, OrtKernelContext* context, const Shape& shape) {
  return static_cast<float*>(output(api, context, 0, shape));
}

Tensor read_rows(const OrtApi& api, const OrtKernelContext* context, size_t index, const char* what,
                 int64_t width) {
  const Tensor tensor = input(api, context, index);
  if (tensor.shape.rank == 3 && tensor.shape.dims[2] == width) return tensor;
  throw Error(EDGELORA_INVALID_ARGUMENT, std::string(what) + " is " + to_string(tensor.shape) +
                                             ", expected [batch, sequence, " +
                                             std::to_string(width) + "]");
}

Tensor read_adapter_ids(const OrtApi& api, const OrtKernelContext* context, size_t index,
                        int64_t batch) {
  const Tensor ids = input(api, context, index);
  if (ids.shape.rank == 1 && ids.shape.dims[0] == batch) return ids;
  throw Error(EDGELORA_INVALID_ARGUMENT, "adapter_ids is " + to_string(ids.shape) +
                                             ", expected [" + std::to_string(batch) + "]");
}

std::string NodeInfo::name() const {
  size_t size = 0;
  check_ort(api_, api_.KernelInfo_GetNodeName(info_, nullptr, &size));
  std::string name(size, '\0');
  check_ort(api_, api_.KernelInfo_GetNodeName(info_, name.data(), &size));
  name.resize(size > 0 ? size - 1 : 0);  // the terminating zero
  return name;
}

NodeInfo NodeInfo::part(const std::string& prefix, size_t first) const {
  NodeInfo part(api_, info_);
  part.prefix_ = prefix;
  part.first_ = first;
  return part;
}

int64_t NodeInfo::integer(const char* attribute) const {
  const std::string name = attribute_name(attribute);
  int64_t value = 0;
  check_attribute(api_, api_.KernelInfoGetAttribute_int64(info_, name.c_str(), &value), name);
  return value;
}

std::vector<int64_t> NodeInfo::integers(const char* attribute) const {
  const std::string name = attribute_name(attribute);
  const auto read = [&](int64_t* values, size_t* count) {
    check_attribute(
        api_, api_.KernelInfoGetAttributeArray_int64(info_, name.c_str(), values, count), name);
  };
  size_t count = 0;
  read(nullptr, &count);  // ONNX Runtime finds none in an attribute of another type
  if (count == 0) throw Error(EDGELORA_BAD_FILE, "attribute " + name + " has no integers");
  std::vector<int64_t> values(count);
  read(values.data(), &count);
  return values;
}

float NodeInfo::real(const char* attribute) const {
  const std::string name = attribute_name(attribute);
  float value = 0.0f;
  check_attribute(api_, api_.KernelInfoGetAttribute_float(info_, name.c_str(), &value), name);
  return value;
}

std::string NodeInfo::text(const char* attribute) const {
  const std::string name = attribute_name(attribute);
  const auto read = [&](char* value, size_t* size) {
    check_attribute(api_, api_.KernelInfoGetAttribute_string(info_, name.c_str(), value, size),
                    name);
  };
  size_t size = 0;
  read(nullptr, &size);
  std::string value(size, '\0');
  read(value.data(), &size);
  value.resize(size > 0 ? size - 1 : 0);
  return value;
}

bool NodeInfo::has_input(size_t relative) const {
  const size_t index = first_ + relative;
  size_t count = 0;
  check_ort(api_, api_.KernelInfo_GetInputCount(info_, &count));
  if (index >= count) return false;
  size_t size = 0;
  check_ort(api_, api_.KernelInfo_GetInputName(info_, index, nullptr, &size));
  return size > 1;  // an omitted optional input has the empty name
}

std::optional<Tensor> NodeInfo::constant(size_t index, const char* what) const {
  if (!has_input(index)) return std::nullopt;
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check_ort(api_,
            api_.KernelInfoGetConstantInput_tensor(info_, first_ + index, &is_constant, &value));
  if (is_constant == 0 || value == nullptr) {
    throw Error(EDGELORA_BAD_FILE, std::string(what) + " must be a constant initializer");
  }
  return view(api_, value);
}

const float* NodeInfo::floats(size_t index, const char* what, int64_t size) const {
  const std::optional<Tensor> tensor = constant(index, what);
  if (!tensor) return nullptr;
  const Shape& shape = tensor->shape;
  if (tensor->type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || shape.rank != 1 ||
      shape.dims[0] != size) {
    throw Error(EDGELORA_BAD_FILE,
                std::string(what) + " must be float32 [" + std::to_string(size) + "]");
  }
  return static_cast<const float*>(tensor->data);
}

}  // namespace edgelora::ops
