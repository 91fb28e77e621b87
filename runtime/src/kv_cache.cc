#include "src/kv_cache.h"

#include <string>

#include <sys/mman.h>

#include "ops/kv_layout.h"
#include "src/error.h"

namespace edgelora {
namespace {

// Zeroed pages that cost nothing until they are written; null if there is no room.
void* reserve(size_t bytes) {
#if !defined(MAP_NORESERVE)
  constexpr int MAP_NORESERVE = 0;
#endif
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
}

}  // namespace

KvFormat KvFormat::floats(const ManifestModel& model) {
  return {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4, model.head_dim, model.head_dim, 1};
}

KvFormat KvFormat::bytes(const ManifestModel& model, bool exact) {
  const ops::KvLayout layout(model.head_dim, exact);
  return {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1, layout.key_row_bytes(), layout.value_row_bytes(),
          ops::kCapacityStep};
}

int64_t KvFormat::position_bytes(const ManifestModel& model) const {
  return int64_t{model.num_hidden_layers} * model.num_key_value_heads * element_bytes *
         (key_width + value_width);
}

KvCache::KvCache(const ManifestModel& model, const KvFormat& format, int64_t context_length)
    : format_(format),
      heads_(model.num_key_value_heads),
      capacity_((context_length + format.step - 1) / format.step * format.step),
      bytes_(static_cast<size_t>(format.position_bytes(model) * capacity_)),
      data_(static_cast<char*>(reserve(bytes_))) {
  if (data_ == nullptr) {
    throw Error(EDGELORA_OUT_OF_MEMORY, "no room for a kv_cache of " + std::to_string(bytes_) +
                                            " bytes (" + std::to_string(context_length) +
                                            " positions); ask for a smaller context_length");
  }
}

OrtHandle<OrtValue> KvCache::tensor(const OnnxRuntime& ort, size_t i) const {
  const int64_t row = heads_ * capacity_ * format_.element_bytes;  // bytes of one element of each
  const auto layer = static_cast<int64_t>(i / 2);
  const int64_t before = layer * (format_.key_width + format_.value_width) +
                         (i % 2 == 0 ? 0 : format_.key_width);
  char* data = data_ + row * before;
  if (format_.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    return ort.tensor(reinterpret_cast<float*>(data), {1, heads_, capacity_, width(i)});
  }
  return ort.tensor(reinterpret_cast<uint8_t*>(data), {1, heads_, capacity_, width(i)});
}

KvCache::~KvCache() { munmap(data_, bytes_); }

}  // namespace edgelora
