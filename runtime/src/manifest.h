// manifest.json: the index of a bundle, read and checked (ARCHITECTURE.md, "The bundle").
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace edgelora {

// The part of the configuration that the runtime works with.
struct ManifestModel {
  int32_t num_hidden_layers;
  int32_t num_key_value_heads;
  int32_t head_dim;
  int32_t vocab_size;
  int32_t context_length;              // positions
  std::vector<int32_t> eos_token_ids;  // each in 0…vocab_size−1
};

// What the index says of a file.
struct ManifestFile {
  int64_t size;        // bytes
  std::string sha256;  // 64 hex digits
};

struct ManifestAdapter {
  std::string path;                 // relative
  std::vector<int32_t> invocation;  // tokens from which on it acts; empty: everywhere
};

struct Manifest {
  std::string folder;
  std::string flavor;  // "edgelora" or "ort"
  ManifestModel model;
  std::string base_fingerprint;  // "sha256:" and 64 hex digits
  std::unordered_map<std::string, std::pair<int64_t, int64_t>>
      targets;                                      // name → {in_features, out_features}
  std::map<std::string, ManifestAdapter> adapters;  // by name
  std::set<std::string> selfchecked;                // those that the self-check knows
  std::string selfcheck;                            // relative path of its file, listed or not
  std::map<std::string, ManifestFile> files;        // by relative path

  // Absolute or caller-relative path of a file of the bundle.
  std::string path(const std::string& relative) const { return folder + "/" + relative; }
};

// Reads folder/manifest.json; checks format, version, digest, every field, and that every file is
// there, inside the folder and of its size, and check_content of all but the adapters. Throws Error
// with EDGELORA_BAD_FILE.
Manifest read_manifest(const std::string& folder);

// Throws unless the listed file has its size and, if that is at most 16 MiB, its SHA-256 (hashing
// takes 3 ms for 1 MB: larger files, the weights above all, are left to `edgelora verify`).
void check_content(const Manifest& manifest, const std::string& relative);

}  // namespace edgelora
