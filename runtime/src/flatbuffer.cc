#include "src/flatbuffer.h"

#include <cstring>
#include <utility>

#include "src/error.h"

namespace edgelora {
namespace {

constexpr int64_t kIdentifier = 4;  // follows the offset of the root
constexpr int64_t kIdentifierSize = 4;
constexpr int64_t kVtableHeader = 4;  // sizes of vtable and table, 16 bits each

}  // namespace

Flatbuffer::Flatbuffer(const uint8_t* data, int64_t size, std::string path)
    : data_(data), size_(size), path_(std::move(path)) {}

void Flatbuffer::damaged() const {
  throw Error(EDGELORA_BAD_FILE, path_ + ": damaged; export the bundle again");
}

void Flatbuffer::require(Place place, int64_t size) const {
  if (place < 0 || size < 0 || place > size_ || size > size_ - place) damaged();
}

template <typename T>
T Flatbuffer::read(Place place) const {
  require(place, sizeof(T));
  T value;
  std::memcpy(&value, data_ + place, sizeof value);
  return value;
}

bool Flatbuffer::has_identifier(const char* four) const {
  return size_ >= kIdentifier + kIdentifierSize &&
         std::memcmp(data_ + kIdentifier, four, kIdentifierSize) == 0;
}

Flatbuffer::Place Flatbuffer::root() const { return read<uint32_t>(0); }

// A table begins with the distance back to its vtable: two sizes, then where each field lies.
Flatbuffer::Place Flatbuffer::field(Place table, int index) const {
  const Place vtable = table - read<int32_t>(table);
  const Place slot = kVtableHeader + 2 * index;
  if (slot + 2 > read<uint16_t>(vtable)) return 0;
  const auto offset = read<uint16_t>(vtable + slot);
  return offset == 0 ? 0 : table + offset;
}

Flatbuffer::Vector Flatbuffer::vector(Place field, int64_t element_size) const {
  if (field == 0) return {0, 0};
  const Place start = field + read<uint32_t>(field);
  const int64_t length = read<uint32_t>(start);
  require(start + 4, length * element_size);
  return {start + 4, length};
}

Flatbuffer::Place Flatbuffer::table(const Vector& tables, int64_t i) const {
  const Place entry = tables.first + 4 * i;
  return entry + read<uint32_t>(entry);
}

std::string Flatbuffer::text(Place field) const {
  const Vector bytes = vector(field, 1);
  return {reinterpret_cast<const char*>(data_ + bytes.first), static_cast<size_t>(bytes.length)};
}

int32_t Flatbuffer::int32(Place field) const { return field == 0 ? 0 : read<int32_t>(field); }

std::vector<int64_t> Flatbuffer::int64s(Place field) const {
  const Vector bytes = vector(field, 8);
  std::vector<int64_t> values;
  for (int64_t i = 0; i < bytes.length; ++i) values.push_back(read<int64_t>(bytes.first + 8 * i));
  return values;
}

}  // namespace edgelora
