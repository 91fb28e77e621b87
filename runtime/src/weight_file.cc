#include "src/weight_file.h"

#include <cstdint>
#include <cstdlib>

#include "src/error.h"
#include "src/protobuf.h"

namespace edgelora {
namespace {

// Numbers of fields in onnx.proto.
constexpr uint64_t kModelGraph = 7;
constexpr uint64_t kGraphInitializer = 5;
enum TensorField : uint64_t { kDims = 1, kDataType = 2, kName = 8, kExternalData = 13 };
enum EntryField : uint64_t { kKey = 1, kValue = 2 };

// An initializer, and where its bytes lie in the file beside the model.
struct StoredTensor {
  std::string name;
  int64_t type = 0;
  std::vector<int64_t> dims;
  std::string location;  // "" for one whose bytes are in the model itself
  int64_t offset = 0;    // bytes
  int64_t length = 0;
};

int64_t number(const std::string& text) { return std::strtoll(text.c_str(), nullptr, 10); }

void read_external(ProtobufMessage entry, StoredTensor* tensor) {
  std::string key, value;
  for (ProtobufMessage::Field field; entry.next(&field);) {
    if (field.number == kKey) key = field.text();
    if (field.number == kValue) value = field.text();
  }
  if (key == "location") tensor->location = value;
  if (key == "offset") tensor->offset = number(value);
  if (key == "length") tensor->length = number(value);
}

// One dimension, or several packed in one field.
void read_dims(const ProtobufMessage::Field& field, std::vector<int64_t>* dims) {
  if (field.data == nullptr) return dims->push_back(static_cast<int64_t>(field.value));
  ProtobufMessage packed = field.message();
  while (!packed.at_end()) dims->push_back(static_cast<int64_t>(packed.varint()));
}

StoredTensor read_tensor(ProtobufMessage message) {
  StoredTensor tensor;
  for (ProtobufMessage::Field field; message.next(&field);) {
    if (field.number == kDims) read_dims(field, &tensor.dims);
    if (field.number == kDataType) tensor.type = static_cast<int64_t>(field.value);
    if (field.number == kName) tensor.name = field.text();
    if (field.number == kExternalData) read_external(field.message(), &tensor);
  }
  return tensor;
}

std::vector<StoredTensor> read_initializers(ProtobufMessage model) {
  std::vector<StoredTensor> tensors;
  for (ProtobufMessage::Field field; model.next(&field);) {
    if (field.number != kModelGraph) continue;
    ProtobufMessage graph = field.message();
    for (ProtobufMessage::Field part; graph.next(&part);) {
      if (part.number == kGraphInitializer) tensors.push_back(read_tensor(part.message()));
    }
  }
  return tensors;
}

OrtHandle<OrtValue> view(const OnnxRuntime& ort, const MappedFile& file,
                         const StoredTensor& tensor) {
  if (tensor.offset < 0 || tensor.length < 0 || tensor.offset > file.size() ||
      tensor.length > file.size() - tensor.offset) {
    throw Error(EDGELORA_BAD_FILE, tensor.name + " lies beyond the end of the file of weights");
  }
  // ORT takes what it reads only for what it might write.
  void* data = const_cast<uint8_t*>(file.data() + tensor.offset);
  return ort.tensor(data, tensor.length, tensor.dims,
                    static_cast<ONNXTensorElementDataType>(tensor.type));
}

}  // namespace

WeightFile::WeightFile(const OnnxRuntime& ort, const std::string& model, const std::string& data)
    : file_(data) {
  const std::string name = data.substr(data.find_last_of('/') + 1);
  const MappedFile graph(model);
  for (const StoredTensor& tensor : read_initializers({graph.data(), graph.size()})) {
    if (tensor.location == name) initializers_.push_back({tensor.name, view(ort, file_, tensor)});
  }
}

void WeightFile::share(const OnnxRuntime& ort, OrtSessionOptions* options) const {
  for (const Initializer& initializer : initializers_) {
    ort.check(ort.api().AddInitializer(options, initializer.name.c_str(), initializer.value.get()));
  }
}

}  // namespace edgelora
