#include "src/safetensors.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "src/error.h"

namespace edgelora {
namespace {

using Json = nlohmann::json;

constexpr int64_t kPrefix = 8;                        // bytes of the header's length
constexpr int64_t kLargestHeader = 64 * 1024 * 1024;  // bytes
constexpr int kHeaderDepth = 3;                       // header, tensor, shape
constexpr const char* kMetadata = "__metadata__";

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw Error(EDGELORA_BAD_FILE, path + ": " + what + "; the file is damaged, make it again");
}

// Accepts events of nlohmann's parser while depth and keys are in order (it keeps the last of two
// equal keys by itself).
class KeyGuard {
 public:
  KeyGuard(const std::string& where, int max_depth, const OnMember& on_member)
      : where_(where), max_depth_(max_depth), on_member_(on_member) {}

  bool operator()(int depth, Json::parse_event_t event, Json& parsed) {
    const bool opens =
        event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start;
    if (opens && depth >= max_depth_) refuse(where_, "the JSON is nested too deeply");
    if (event == Json::parse_event_t::object_start) keys_.emplace_back();
    if (event == Json::parse_event_t::object_end) keys_.pop_back();
    if (event == Json::parse_event_t::key) check_key(parsed.get_ref<const std::string&>());
    if (depth == 1 && event == Json::parse_event_t::key) member_ = parsed.get<std::string>();
    if (depth == 1 && event == Json::parse_event_t::object_end && on_member_) {
      on_member_(member_, parsed);
    }
    return true;
  }

 private:
  void check_key(const std::string& key) {
    if (!keys_.back().insert(key).second)
      refuse(where_, "the JSON has the key \"" + key + "\" twice");
  }

  std::string where_;
  int max_depth_;
  OnMember on_member_;
  std::string member_;                       // the outermost object's last key
  std::vector<std::set<std::string>> keys_;  // of the objects that are open
};

// The file as the steps below see it.
struct Source {
  const std::string& path;
  const uint8_t* data;  // the tensors' bytes
  int64_t size;
};

// Bounds that no conversion and no sum can leave.
int64_t to_size(const std::string& path, const std::string& name, const Json& value) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() > uint64_t{INT64_MAX}) {
    refuse(path, name + " has a size or offset that is no integer in range");
  }
  return static_cast<int64_t>(value.get<uint64_t>());
}

const Json& member(const std::string& path, const std::string& name, const Json& entry,
                   const char* key, Json::value_t type) {
  const auto found = entry.find(key);
  if (found == entry.end() || found->type() != type) {
    refuse(path, name + " has no valid " + key);
  }
  return *found;
}

int64_t bytes_of(const std::string& path, const std::string& name, const SafeTensor& tensor) {
  int64_t bytes = tensor.dtype == "F16" ? 2 : tensor.dtype == "F32" ? 4 : 0;
  if (bytes == 0) refuse(path, name + " is " + tensor.dtype + ", expected F16 or F32");
  for (const int64_t dim : tensor.shape) {
    if (__builtin_mul_overflow(bytes, dim, &bytes)) refuse(path, name + " is too large");
  }
  return bytes;
}

SafeTensor parse_tensor(const Source& source, const std::string& name, const Json& entry) {
  const std::string& path = source.path;
  if (!entry.is_object() || entry.size() != 3) refuse(path, name + " is no tensor entry");
  SafeTensor tensor{};
  tensor.dtype = member(path, name, entry, "dtype", Json::value_t::string).get<std::string>();
  for (const Json& dim : member(path, name, entry, "shape", Json::value_t::array)) {
    tensor.shape.push_back(to_size(path, name, dim));
  }
  const Json& offsets = member(path, name, entry, "data_offsets", Json::value_t::array);
  if (offsets.size() != 2) refuse(path, name + " has no two data_offsets");
  const int64_t begin = to_size(path, name, offsets[0]);
  const int64_t end = to_size(path, name, offsets[1]);
  if (begin > end || end > source.size) refuse(path, name + " lies outside the file");
  tensor.bytes = end - begin;
  if (tensor.bytes != bytes_of(path, name, tensor)) {
    refuse(path, name + " has another number of bytes than its shape");
  }
  tensor.data = source.data + begin;
  return tensor;
}

// Tensors must cover the bytes one after the other, so that nothing is hidden and nothing overlaps.
void check_contiguous(const Source& source, const std::map<std::string, SafeTensor>& tensors) {
  std::vector<std::pair<const uint8_t*, int64_t>> ranges;
  for (const auto& [name, tensor] : tensors) ranges.emplace_back(tensor.data, tensor.bytes);
  std::sort(ranges.begin(), ranges.end());
  const uint8_t* end = source.data;
  for (const auto& [data, bytes] : ranges) {
    if (data != end) refuse(source.path, "tensors overlap or leave a gap");
    end += bytes;
  }
  if (end != source.data + source.size) refuse(source.path, "bytes follow the last tensor");
}

Metadata parse_metadata(const std::string& path, const Json& entry) {
  Metadata metadata;
  for (const auto& [key, value] : entry.items()) {
    if (!value.is_string()) refuse(path, "__metadata__ " + key + " is no string");
    metadata[key] = value.get<std::string>();
  }
  return metadata;
}

int64_t header_length(const std::string& path, const uint8_t* data, int64_t size) {
  uint64_t length = 0;
  if (size < kPrefix) refuse(path, "too short for a safetensors file");
  for (int i = 0; i < kPrefix; ++i) length |= uint64_t{data[i]} << (8 * i);
  if (length > static_cast<uint64_t>(std::min(size - kPrefix, kLargestHeader))) {
    refuse(path, "the header is longer than the file or than 64 MB");
  }
  return static_cast<int64_t>(length);
}

}  // namespace

Json parse_json_object(const std::string& where, const char* begin, const char* end,
                       int max_depth, const OnMember& on_member) {
  Json json;
  try {
    json = Json::parse(begin, end, KeyGuard(where, max_depth, on_member));
  } catch (const Json::exception&) {  // its text quotes the file: not one line, not ours
    refuse(where, "not valid JSON");
  }
  if (!json.is_object()) refuse(where, "the JSON is no object");
  return json;
}

SafeTensors parse_safetensors(const std::string& path, const uint8_t* data, int64_t size,
                              const std::function<void(const Metadata&)>& check) {
  const int64_t length = header_length(path, data, size);
  const auto* text = reinterpret_cast<const char*>(data + kPrefix);
  SafeTensors result;
  const auto read_metadata = [&](const std::string& key, const Json& entry) {
    if (key == kMetadata) check(result.metadata = parse_metadata(path, entry));
  };
  const Json header = parse_json_object(path, text, text + length, kHeaderDepth, read_metadata);
  const Json metadata = header.value(kMetadata, Json::object());
  if (!metadata.is_object()) refuse(path, "__metadata__ is no object");
  if (metadata.empty()) check({});
  const Source source{path, data + kPrefix + length, size - kPrefix - length};
  for (const auto& [name, entry] : header.items()) {
    if (name != kMetadata) result.tensors.emplace(name, parse_tensor(source, name, entry));
  }
  check_contiguous(source, result.tensors);
  return result;
}

}  // namespace edgelora
