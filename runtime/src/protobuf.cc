#include "src/protobuf.h"

#include "src/error.h"

namespace edgelora {
namespace {

enum WireType { kVarint = 0, kFixed64 = 1, kLength = 2, kFixed32 = 5 };

[[noreturn]] void damaged() {
  throw Error(EDGELORA_BAD_FILE, "is no ONNX model");
}

}  // namespace

std::string ProtobufMessage::Field::text() const {
  return {reinterpret_cast<const char*>(data), static_cast<size_t>(size)};
}

uint64_t ProtobufMessage::varint() {
  uint64_t value = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    if (at_ == end_) damaged();
    const uint8_t byte = *at_++;
    value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if (byte < 0x80) return value;
  }
  damaged();
}

void ProtobufMessage::skip(int64_t size) {
  if (size < 0 || size > end_ - at_) damaged();
  at_ += size;
}

bool ProtobufMessage::next(Field* field) {
  if (at_end()) return false;
  const uint64_t tag = varint();
  *field = {tag >> 3, 0, nullptr, 0};
  switch (tag & 7) {
    case kVarint:
      field->value = varint();
      return true;
    case kLength:
      field->size = static_cast<int64_t>(varint());
      field->data = at_;
      skip(field->size);
      return true;
    case kFixed64:
      skip(8);
      return true;
    case kFixed32:
      skip(4);
      return true;
    default:
      damaged();
  }
}

}  // namespace edgelora
