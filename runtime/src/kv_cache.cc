#include "src/kv_cache.h"

#include <cstring>
#include <string>
#include <vector>

#include <sys/mman.h>

#include "ops/kv_layout.h"
#include "ops/registration.h"
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
  return {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4, model.head_dim, model.head_dim, 1, true};
}

KvFormat KvFormat::bytes(const ManifestModel& model, bool exact) {
  const ops::KvLayout layout(model.head_dim, exact);
  return {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1, layout.key_row_bytes(), layout.value_row_bytes(),
          ops::kCapacityStep, exact};
}

int64_t KvFormat::position_bytes(const ManifestModel& model) const {
  return int64_t{model.num_hidden_layers} * model.num_key_value_heads * element_bytes *
         (key_width + value_width);
}

KvCache::KvCache(const ManifestModel& model, const KvFormat& format, int64_t context_length)
    : format_(format),
      heads_(model.num_key_value_heads),
      head_dim_(model.head_dim),
      capacity_((context_length + format.step - 1) / format.step * format.step),
      bytes_(static_cast<size_t>(format.position_bytes(model) * capacity_)),
      data_(static_cast<char*>(reserve(bytes_))) {
  if (data_ == nullptr) {
    throw Error(EDGELORA_OUT_OF_MEMORY, "no room for a kv_cache of " + std::to_string(bytes_) +
                                            " bytes (" + std::to_string(context_length) +
                                            " positions); ask for a smaller context_length");
  }
}

char* KvCache::tensor_data(size_t i) const {
  const int64_t row = heads_ * capacity_ * format_.element_bytes;  // bytes of one element of each
  const auto layer = static_cast<int64_t>(i / 2);
  const int64_t before = layer * (format_.key_width + format_.value_width) +
                         (i % 2 == 0 ? 0 : format_.key_width);
  return data_ + row * before;
}

OrtHandle<OrtValue> KvCache::tensor(const OnnxRuntime& ort, size_t i) const {
  char* data = tensor_data(i);
  if (format_.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    return ort.tensor(reinterpret_cast<float*>(data), {1, heads_, capacity_, width(i)});
  }
  return ort.tensor(reinterpret_cast<uint8_t*>(data), {1, heads_, capacity_, width(i)});
}

void KvCache::put(const Prefix& prefix) {
  const kernels::KernelTable& kernels = selected_kernels();
  const bool floats = format_.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  std::vector<float> key(static_cast<size_t>(head_dim_)), value(key.size());
  Row row{0, 0, 0, key.data(), value.data()};
  for (row.layer = 0; row.layer < prefix.shape.layers; ++row.layer) {
    for (row.head = 0; row.head < heads_; ++row.head) {
      for (row.position = 0; row.position < prefix.positions; ++row.position) {
        prefix.read(prefix.keys, row.layer, row.head, row.position, key.data());
        prefix.read(prefix.values, row.layer, row.head, row.position, value.data());
        floats ? put_floats(row) : put_bytes(row, kernels);
      }
    }
  }
}

void KvCache::put_floats(const Row& row) {
  const auto bytes = static_cast<size_t>(4 * head_dim_);
  const size_t at = static_cast<size_t>(row.head * capacity_ + row.position) * bytes;
  const auto tensor = static_cast<size_t>(2 * row.layer);
  std::memcpy(tensor_data(tensor) + at, row.key, bytes);
  std::memcpy(tensor_data(tensor + 1) + at, row.value, bytes);
}

void KvCache::put_bytes(const Row& row, const kernels::KernelTable& kernels) {
  const ops::KvLayout layout(head_dim_, format_.exact);
  const auto head = [&](int64_t tensor, int64_t row_bytes) {
    char* data = tensor_data(static_cast<size_t>(tensor)) + row.head * capacity_ * row_bytes;
    return reinterpret_cast<uint8_t*>(data);
  };
  ops::KeyRows(layout, capacity_, head(2 * row.layer, format_.key_width))
      .put(kernels, row.position, row.key);
  ops::ValueRows(layout, capacity_, head(2 * row.layer + 1, format_.value_width))
      .put(row.position, row.value);
}

KvCache::~KvCache() { munmap(data_, bytes_); }

}  // namespace edgelora
