// Reads a protobuf message that may be anything: every access is checked against its end.
#pragma once

#include <cstdint>
#include <string>

namespace edgelora {

// The fields of a message, in the order of its bytes (Protocol Buffers, "Encoding").
class ProtobufMessage {
 public:
  struct Field {
    uint64_t number;     // of the schema
    uint64_t value;      // of a varint, else 0
    const uint8_t* data; // of what has a length, else null
    int64_t size;        // bytes of it

    std::string text() const;
    ProtobufMessage message() const { return {data, size}; }
  };

  // The bytes must outlive this.
  ProtobufMessage(const uint8_t* data, int64_t size) : at_(data), end_(data + size) {}

  // The next field, false behind the last. Throws Error: the bytes are no such message.
  bool next(Field* field);
  bool at_end() const { return at_ == end_; }
  uint64_t varint();

 private:
  void skip(int64_t size);

  const uint8_t* at_;
  const uint8_t* end_;
};

}  // namespace edgelora
