// Reads the safetensors format: 8 bytes header length (little-endian), a JSON header, the tensors'
// bytes without gaps.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace edgelora {

struct SafeTensor {
  std::string dtype;  // "F16", "F32"
  std::vector<int64_t> shape;
  const uint8_t* data;  // into the bytes given; not aligned
  int64_t bytes;
};

using Metadata = std::map<std::string, std::string>;

struct SafeTensors {
  Metadata metadata;
  std::map<std::string, SafeTensor> tensors;
};

// Sees each member of a JSON object that is an object itself as soon as its end has been read.
using OnMember = std::function<void(const std::string& key, const nlohmann::json& value)>;

// Parses one JSON object with unique keys, at most `max_depth` levels deep. Throws Error; messages
// begin with `where`.
nlohmann::json parse_json_object(const std::string& where, const char* begin, const char* end,
                                 int max_depth, const OnMember& on_member = {});

// Checks everything that the format promises, for tensors of F16 and F32, so that the results can
// be used without further checks. `check` gets the metadata (empty if there are none) before
// anything else is looked at, if it stands first in the file: what it throws costs no more than
// that. Throws Error(EDGELORA_BAD_FILE); `path` is for messages.
SafeTensors parse_safetensors(const std::string& path, const uint8_t* data, int64_t size,
                              const std::function<void(const Metadata&)>& check);

}  // namespace edgelora
