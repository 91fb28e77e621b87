// The protobuf reader: the wire format's own examples, and bytes that are no message.
#include "src/protobuf.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "src/error.h"
#include "test_check.h"

namespace edgelora::test {
namespace {

using Bytes = std::vector<uint8_t>;
using Field = ProtobufMessage::Field;

ProtobufMessage message(const Bytes& bytes) {
  return {bytes.data(), static_cast<int64_t>(bytes.size())};
}

// Reads all fields; false where the bytes are refused.
bool readable(const Bytes& bytes) {
  ProtobufMessage all = message(bytes);
  try {
    for (Field field; all.next(&field);) continue;
  } catch (const Error& error) {
    CHECK(error.status() == EDGELORA_BAD_FILE);
    return false;
  }
  return true;
}

void test_fields_of_each_kind() {
  const Bytes bytes = {0x08, 0x96, 0x01,                                // 1: 150
                       0x12, 0x07, 't',  'e', 's', 't', 'i', 'n', 'g',  // 2: "testing"
                       0x19, 1,    2,    3,   4,   5,   6,   7,   8,    // 3: 64 bits
                       0x25, 1,    2,    3,   4,                        // 4: 32 bits
                       0x82, 0x01, 0x00};                               // 16: ""
  ProtobufMessage all = message(bytes);
  Field field;
  CHECK(all.next(&field) && field.number == 1 && field.value == 150 && field.data == nullptr);
  CHECK(all.next(&field) && field.number == 2 && field.text() == "testing");
  CHECK(all.next(&field) && field.number == 3);
  CHECK(all.next(&field) && field.number == 4);
  CHECK(all.next(&field) && field.number == 16 && field.data != nullptr && field.size == 0);
  CHECK(!all.next(&field) && all.at_end());
}

void test_a_message_in_a_message_and_negative_numbers() {
  const Bytes bytes = {0x2a, 0x0b, 0x08, 0xff, 0xff, 0xff, 0xff,
                       0xff, 0xff, 0xff, 0xff, 0xff, 0x01};
  ProtobufMessage all = message(bytes);
  Field outer, inner;
  CHECK(all.next(&outer) && outer.number == 5);
  ProtobufMessage part = outer.message();
  CHECK(part.next(&inner) && static_cast<int64_t>(inner.value) == -1);
  CHECK(part.at_end());
}

void test_every_truncation_is_refused() {
  const Bytes bytes = {0x08, 0x96, 0x01, 0x12, 0x03, 'a', 'b', 'c', 0x19, 1, 2, 3, 4, 5, 6, 7, 8};
  const size_t ends[] = {0, 3, 8, bytes.size()};  // of fields
  for (size_t size = 0; size <= bytes.size(); ++size) {
    const bool whole = std::find(std::begin(ends), std::end(ends), size) != std::end(ends);
    CHECK(readable(Bytes(bytes.begin(), bytes.begin() + static_cast<long>(size))) == whole);
  }
}

void test_lengths_and_numbers_out_of_bounds_are_refused() {
  CHECK(!readable({0x12, 0x04, 'a', 'b', 'c'}));
  CHECK(!readable({0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}));  // −1
  CHECK(!readable({0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}));  // 2^63 − 1
  CHECK(!readable(Bytes(11, 0xff)));
  for (const uint8_t tag : Bytes{0x0b, 0x0c, 0x0e, 0x0f}) CHECK(!readable({tag, 0}));
}

}  // namespace
}  // namespace edgelora::test

int main() {
  edgelora::test::test_fields_of_each_kind();
  edgelora::test::test_a_message_in_a_message_and_negative_numbers();
  edgelora::test::test_every_truncation_is_refused();
  edgelora::test::test_lengths_and_numbers_out_of_bounds_are_refused();
  std::printf("%d failures\n", edgelora::test::failures.load());
  return edgelora::test::failures == 0 ? 0 : 1;
}
