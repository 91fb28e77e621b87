// Writes adapter.safetensors from the documented layout, right or wrong on purpose.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace edgelora::test {

using Json = nlohmann::ordered_json;

inline const std::string kBase = "sha256:" + std::string(64, 'a');

// A file in the making: tests change the header or the data, then take the bytes.
struct AdapterBytes {
  Json header = Json::object();
  std::string data;

  AdapterBytes() {
    header["__metadata__"] = {{"format", "edgelora-adapter"},
                              {"format_version", "1"},
                              {"name", "test"},
                              {"base_fingerprint", kBase},
                              {"scaling", "{}"}};
  }

  Json& metadata() { return header["__metadata__"]; }

  void tensor(const std::string& name, const std::vector<int64_t>& shape,
              const std::vector<float>& values) {
    const size_t begin = data.size();
    data.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    header[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, data.size()}}};
  }

  // a [rank, K], b [N, rank], row-major.
  void target(const std::string& name, int64_t rank, const std::vector<float>& a,
              const std::vector<float>& b, double scaling) {
    const int64_t k = static_cast<int64_t>(a.size()) / rank;
    const int64_t n = static_cast<int64_t>(b.size()) / rank;
    const int64_t panels = (n + 15) / 16;
    std::vector<float> packed(static_cast<size_t>(panels * rank * 16), 0.0F);
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t r = 0; r < rank; ++r) {
        packed[static_cast<size_t>((row / 16 * rank + r) * 16 + row % 16)] =
            b[static_cast<size_t>(row * rank + r)];
      }
    }
    tensor(name + ".lora_a", {rank, k}, a);
    tensor(name + ".lora_b", {panels, rank, 16}, packed);
    this->scaling(name, scaling);
  }

  void scaling(const std::string& target, double value) {
    Json scalings = Json::parse(metadata()["scaling"].get<std::string>());
    scalings[target] = value;
    metadata()["scaling"] = scalings.dump();
  }

  static std::string with_header(const std::string& text, const std::string& data) {
    const uint64_t length = text.size();
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    return bytes + text + data;
  }

  std::string bytes() const { return with_header(header.dump(), data); }
};

inline void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

}  // namespace edgelora::test
