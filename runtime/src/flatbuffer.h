// Reads a flatbuffer that may be anything: every access is checked against its end.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace edgelora {

class Flatbuffer {
 public:
  // `path` is for messages; the bytes must outlive this.
  Flatbuffer(const uint8_t* data, int64_t size, std::string path);

  // A place in the bytes; 0 where a table leaves a field out.
  using Place = int64_t;

  struct Vector {
    Place first;     // of its elements
    int64_t length;  // elements
  };

  bool has_identifier(const char* four) const;
  Place root() const;                                      // table
  Place field(Place table, int index) const;               // of the schema's order, from 0
  Vector vector(Place field, int64_t element_size) const;  // wholly inside; empty if left out
  Place table(const Vector& tables, int64_t i) const;      // of a vector of tables
  std::string text(Place field) const;                     // "" if left out
  int32_t int32(Place field) const;                        // 0 if left out
  std::vector<int64_t> int64s(Place field) const;

  // Throws Error: the file is damaged.
  [[noreturn]] void damaged() const;

 private:
  template <typename T>
  T read(Place place) const;
  void require(Place place, int64_t size) const;

  const uint8_t* data_;
  int64_t size_;  // bytes
  std::string path_;
};

}  // namespace edgelora
